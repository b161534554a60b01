// Raw preview 1 calls and the exact errors of this host. Each test is one run:
// argv[1] names it, and it starts on an empty directory at descriptor 3.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <wasi/api.h>

#define ROOT 3
#define ALL ((__wasi_rights_t)-1)
#define R(x) __WASI_RIGHTS_##x

static void fail(const char *what, int line, int got, int want) {
  fprintf(stderr, "line %d: %s: %d, want %d\n", line, what, got, want);
  exit(1);
}
#define EQ(x, want)                                              \
  do {                                                           \
    long long got_ = (long long)(x), want_ = (long long)(want);  \
    if (got_ != want_) fail(#x, __LINE__, (int)got_, (int)want_); \
  } while (0)
#define OK(x) EQ(x, __WASI_ERRNO_SUCCESS)
#define ERR(name, x) EQ(x, __WASI_ERRNO_##name)

int32_t raise_raw(int32_t) __attribute__((import_module("wasi_snapshot_preview1"), import_name("proc_raise")));
int32_t open_raw(int32_t, int32_t, const char *, int32_t, int32_t, int64_t, int64_t, int32_t, __wasi_fd_t *)
    __attribute__((import_module("wasi_snapshot_preview1"), import_name("path_open")));

static __wasi_errno_t open_at(int dir, const char *path, int look, int oflags, __wasi_rights_t base, int flags, __wasi_fd_t *fd) {
  return __wasi_path_open(dir, look, path, oflags, base, 0, flags, fd);
}
static __wasi_errno_t try_open(const char *path, int look, int oflags) {
  __wasi_fd_t fd;
  __wasi_errno_t e = open_at(ROOT, path, look, oflags, 0, 0, &fd);
  if (e == 0) OK(__wasi_fd_close(fd));
  return e;
}
static __wasi_fd_t must_open(const char *path, int oflags, __wasi_rights_t base) {
  __wasi_fd_t fd;
  OK(open_at(ROOT, path, 0, oflags, base, 0, &fd));
  return fd;
}
static void touch(const char *path) { OK(try_open(path, 0, __WASI_OFLAGS_CREAT)); }
static void mkdir_(const char *path) { OK(__wasi_path_create_directory(ROOT, path)); }
static __wasi_errno_t wr(int fd, const char *text) {
  __wasi_ciovec_t v = {(const uint8_t *)text, strlen(text)};
  __wasi_size_t n = 0;
  __wasi_errno_t e = __wasi_fd_write(fd, &v, 1, &n);
  if (e == 0) EQ(n, strlen(text));
  return e;
}
static __wasi_errno_t rd(int fd, char *buf, int size, __wasi_size_t *n) {
  __wasi_iovec_t v = {(uint8_t *)buf, size};
  return __wasi_fd_read(fd, &v, 1, n);
}
static __wasi_errno_t stat_(const char *path, int look, __wasi_filestat_t *st) {
  return __wasi_path_filestat_get(ROOT, look, path, st);
}
static __wasi_fd_t open_dir(const char *path) {
  __wasi_fd_t fd;
  __wasi_fdstat_t st;
  OK(__wasi_fd_fdstat_get(ROOT, &st));
  OK(__wasi_path_open(ROOT, 0, path, __WASI_OFLAGS_DIRECTORY, st.fs_rights_base, st.fs_rights_inheriting, 0, &fd));
  return fd;
}

static void big_random_buf(void) {
  static uint8_t b[1024];
  OK(__wasi_random_get(b, sizeof b));
  int any = 0;
  for (int i = 0; i < 1024; i++) any |= b[i];
  EQ(any != 0, 1);
  OK(__wasi_random_get(b, 0));
  ERR(FAULT, __wasi_random_get((uint8_t *)0xfffffff0, 64));
}

static void clocks(void) {
  __wasi_timestamp_t a, b;
  for (int id = 0; id < 2; id++) {
    OK(__wasi_clock_res_get(id, &a));
    EQ(a, 1);
    OK(__wasi_clock_time_get(id, 1, &a));
    OK(__wasi_clock_time_get(id, 0, &b));
    EQ(a <= b && a > 0, 1);
  }
  ERR(NOTSUP, __wasi_clock_time_get(__WASI_CLOCKID_PROCESS_CPUTIME_ID, 0, &a));
  ERR(NOTSUP, __wasi_clock_res_get(__WASI_CLOCKID_THREAD_CPUTIME_ID, &a));
  ERR(INVAL, __wasi_clock_time_get(4, 0, &a));
}

static void close_preopen(void) {
  __wasi_fdstat_t st;
  __wasi_fd_t fd = open_dir(".");
  OK(__wasi_fd_close(ROOT));
  OK(__wasi_fd_fdstat_get(fd, &st));
  EQ(st.fs_filetype, __WASI_FILETYPE_DIRECTORY);
  ERR(BADF, __wasi_fd_fdstat_get(ROOT, &st));
  ERR(BADF, __wasi_fd_close(ROOT));
}

static void overwrite_preopen(void) {
  __wasi_filestat_t a, b;
  __wasi_fdstat_t st;
  __wasi_prestat_t pre;
  __wasi_fd_t fd;
  mkdir_("d");
  fd = open_dir("d");
  OK(__wasi_fd_filestat_get(fd, &a));
  OK(__wasi_fd_renumber(fd, ROOT));
  OK(__wasi_fd_filestat_get(ROOT, &b));
  EQ(a.dev == b.dev && a.ino == b.ino, 1);
  ERR(BADF, __wasi_fd_fdstat_get(fd, &st));
  ERR(BADF, __wasi_fd_prestat_get(ROOT, &pre));
}

static void dangling_fd(void) {
  char buf[8];
  __wasi_size_t n;
  __wasi_filestat_t st;
  __wasi_fd_t fd = must_open("f", __WASI_OFLAGS_CREAT, R(FD_READ) | R(FD_WRITE) | R(FD_SEEK) | R(FD_FILESTAT_GET));
  OK(__wasi_path_unlink_file(ROOT, "f"));
  OK(wr(fd, "ghost"));
  __wasi_filesize_t at;
  OK(__wasi_fd_seek(fd, 0, __WASI_WHENCE_SET, &at));
  OK(rd(fd, buf, 8, &n));
  EQ(n, 5);
  OK(__wasi_fd_filestat_get(fd, &st));
  EQ(st.nlink, 0);
  touch("f");
  OK(__wasi_path_unlink_file(ROOT, "f"));
  mkdir_("d");
  __wasi_fd_t dir = open_dir("d");
  OK(__wasi_path_remove_directory(ROOT, "d"));
  ERR(NOENT, __wasi_path_create_directory(dir, "x"));
  ERR(NOENT, __wasi_fd_readdir(dir, (uint8_t *)buf, 8, 0, &n));
  mkdir_("d");
}

static void dangling_symlink(void) {
  OK(__wasi_path_symlink("target", ROOT, "s"));
  ERR(LOOP, try_open("s", 0, __WASI_OFLAGS_DIRECTORY));
  ERR(LOOP, try_open("s", 0, 0));
  ERR(NOENT, try_open("s", 1, 0));
  ERR(EXIST, try_open("s", 1, __WASI_OFLAGS_CREAT | __WASI_OFLAGS_EXCL));
  OK(try_open("s", 1, __WASI_OFLAGS_CREAT));
  OK(try_open("target", 0, 0));
}

static void dir_fd_op_failures(void) {
  char buf[8];
  uint8_t name[8] = "xxxxxxx";
  __wasi_size_t n;
  __wasi_filesize_t at;
  __wasi_iovec_t in = {(uint8_t *)buf, 8};
  __wasi_ciovec_t out = {(uint8_t *)buf, 8};
  __wasi_prestat_t pre;
  OK(__wasi_fd_prestat_get(ROOT, &pre));
  EQ(pre.u.dir.pr_name_len, 1);
  ERR(NAMETOOLONG, __wasi_fd_prestat_dir_name(ROOT, name, 0));
  OK(__wasi_fd_prestat_dir_name(ROOT, name, 8));
  EQ(memcmp(name, "/xxxxxx", 8), 0);
  ERR(ISDIR, __wasi_fd_read(ROOT, &in, 1, &n));
  ERR(ISDIR, __wasi_fd_pread(ROOT, &in, 1, 0, &n));
  ERR(ISDIR, __wasi_fd_write(ROOT, &out, 1, &n));
  ERR(ISDIR, __wasi_fd_pwrite(ROOT, &out, 1, 0, &n));
  for (int w = 0; w < 3; w++) ERR(ISDIR, __wasi_fd_seek(ROOT, 0, w, &at));
  ERR(ISDIR, __wasi_fd_tell(ROOT, &at));
  ERR(ISDIR, __wasi_fd_allocate(ROOT, 0, 1));
  ERR(ISDIR, __wasi_fd_filestat_set_size(ROOT, 0));
}

static void directory_seek(void) {
  __wasi_filesize_t at;
  __wasi_fdstat_t st;
  mkdir_("d");
  __wasi_fd_t fd = must_open("d", __WASI_OFLAGS_DIRECTORY, R(FD_SEEK));
  ERR(ISDIR, __wasi_fd_seek(fd, 0, __WASI_WHENCE_CUR, &at));
  OK(__wasi_fd_fdstat_get(fd, &st));
  EQ(st.fs_rights_base, 0);
}

static void fd_advise(void) {
  __wasi_filestat_t st;
  __wasi_fd_t fd = must_open("f", __WASI_OFLAGS_CREAT, R(FD_ADVISE) | R(FD_FILESTAT_GET) | R(FD_FILESTAT_SET_SIZE) | R(FD_ALLOCATE));
  OK(__wasi_fd_filestat_set_size(fd, 100));
  OK(__wasi_fd_advise(fd, 10, 50, __WASI_ADVICE_NORMAL));
  ERR(INVAL, __wasi_fd_advise(fd, 0, 0, 6));
  OK(__wasi_fd_allocate(fd, 100, 100));
  OK(__wasi_fd_filestat_get(fd, &st));
  EQ(st.size, 200);
  ERR(SPIPE, __wasi_fd_advise(1, 0, 0, 0));
}

static void fd_fdstat_set_rights(void) {
  char buf[4];
  __wasi_size_t n;
  __wasi_fdstat_t st;
  __wasi_fd_t fd = must_open("f", __WASI_OFLAGS_CREAT, R(FD_READ) | R(FD_WRITE) | R(FD_SEEK) | R(FD_TELL));
  OK(wr(fd, "abcd"));
  OK(__wasi_fd_fdstat_set_rights(fd, R(FD_SEEK) | R(FD_TELL), 0));
  OK(__wasi_fd_fdstat_get(fd, &st));
  EQ(st.fs_rights_base, R(FD_SEEK) | R(FD_TELL));
  ERR(BADF, rd(fd, buf, 4, &n));
  ERR(BADF, wr(fd, "x"));
  ERR(NOTCAPABLE, __wasi_fd_fdstat_set_rights(fd, R(FD_READ) | R(FD_SEEK), 0));
  ERR(NOTCAPABLE, __wasi_fd_fdstat_set_rights(fd, 0, R(FD_READ)));
  ERR(NOTCAPABLE, __wasi_fd_fdstat_set_rights(fd, ALL, 0));
  // What a directory does not let inherit, its files cannot have.
  OK(__wasi_fd_fdstat_get(ROOT, &st));
  OK(__wasi_fd_fdstat_set_rights(ROOT, st.fs_rights_base & ~R(PATH_UNLINK_FILE), st.fs_rights_inheriting & ~R(FD_READ)));
  ERR(NOTCAPABLE, open_at(ROOT, "f", 0, 0, R(FD_READ), 0, &fd));
  OK(open_at(ROOT, "f", 0, 0, R(FD_WRITE), 0, &fd));
  ERR(NOTCAPABLE, __wasi_path_unlink_file(ROOT, "f"));
  ERR(NOTCAPABLE, __wasi_path_open(ROOT, 0, ".", 0, 0, R(FD_READ), 0, &fd));
}

static void fd_filestat_set(void) {
  __wasi_filestat_t a, b;
  __wasi_fd_t fd = must_open("f", __WASI_OFLAGS_CREAT, R(FD_FILESTAT_GET) | R(FD_FILESTAT_SET_SIZE) | R(FD_FILESTAT_SET_TIMES));
  OK(__wasi_fd_filestat_set_size(fd, 100));
  OK(__wasi_fd_filestat_get(fd, &a));
  EQ(a.size, 100);
  OK(__wasi_fd_filestat_set_times(fd, a.mtim - 100, a.mtim - 100, __WASI_FSTFLAGS_MTIM));
  OK(__wasi_fd_filestat_get(fd, &b));
  EQ(b.mtim, a.mtim - 100);
  EQ(b.atim, a.atim);
  EQ(b.size, 100);
  OK(__wasi_fd_filestat_set_times(fd, 0, 0, __WASI_FSTFLAGS_ATIM_NOW | __WASI_FSTFLAGS_MTIM_NOW));
  OK(__wasi_fd_filestat_get(fd, &b));
  EQ(b.mtim >= a.mtim, 1);
  ERR(INVAL, __wasi_fd_filestat_set_times(fd, 1, 2, __WASI_FSTFLAGS_MTIM | __WASI_FSTFLAGS_MTIM_NOW));
  ERR(INVAL, __wasi_fd_filestat_set_times(fd, 1, 2, __WASI_FSTFLAGS_ATIM | __WASI_FSTFLAGS_ATIM_NOW));
  ERR(INVAL, __wasi_fd_filestat_set_times(fd, 1, 2, 16));
  ERR(INVAL, __wasi_fd_filestat_set_size(fd, (uint64_t)1 << 63));
  ERR(NOSPC, __wasi_fd_filestat_set_size(fd, (uint64_t)1 << 62));
}

static void fd_flags_set(void) {
  char buf[16];
  __wasi_size_t n;
  __wasi_filesize_t at;
  __wasi_fd_t fd;
  __wasi_filestat_t st;
  OK(open_at(ROOT, "f", 0, __WASI_OFLAGS_CREAT, R(FD_READ) | R(FD_WRITE) | R(FD_SEEK) | R(FD_TELL) | R(FD_FDSTAT_SET_FLAGS), __WASI_FDFLAGS_APPEND, &fd));
  OK(wr(fd, "0000"));
  OK(__wasi_fd_seek(fd, 0, __WASI_WHENCE_SET, &at));
  OK(wr(fd, "1111"));
  OK(__wasi_fd_tell(fd, &at));
  EQ(at, 8);
  OK(__wasi_fd_fdstat_set_flags(fd, 0));
  OK(__wasi_fd_seek(fd, 0, __WASI_WHENCE_SET, &at));
  OK(wr(fd, "22"));
  OK(__wasi_fd_seek(fd, 0, __WASI_WHENCE_SET, &at));
  OK(rd(fd, buf, 16, &n));
  EQ(n, 8);
  EQ(memcmp(buf, "22001111", 8), 0);
  OK(stat_("f", 0, &st));
  EQ(st.size, 8);
  ERR(INVAL, __wasi_fd_fdstat_set_flags(fd, 32));
}

static int entries(int fd, uint64_t *cookie, int size, int *eof) {
  static uint8_t buf[4096];
  __wasi_size_t used;
  OK(__wasi_fd_readdir(fd, buf, size, *cookie, &used));
  *eof = used < (unsigned)size;
  int count = 0;
  for (unsigned at = 0; at + 24 <= used; count++) {
    __wasi_dirent_t d;
    memcpy(&d, buf + at, 24);
    if (at + 24 + d.d_namlen > used) break;
    *cookie = d.d_next;
    at += 24 + d.d_namlen;
  }
  return count;
}

static void fd_readdir(void) {
  uint64_t cookie = 0;
  int eof;
  mkdir_("d");
  __wasi_fd_t dir = open_dir("d");
  EQ(entries(dir, &cookie, 256, &eof), 2);
  EQ(eof, 1);
  char name[16];
  for (int i = 0; i < 1000; i++) {
    snprintf(name, sizeof name, "d/file.%d", i);
    touch(name);
  }
  int total = 0;
  cookie = 0;
  do total += entries(dir, &cookie, 256, &eof);
  while (!eof);
  EQ(total, 1002);
  // Names that come and go do not move those that stay.
  cookie = 0;
  total = entries(dir, &cookie, 4096, &eof);
  OK(__wasi_path_unlink_file(dir, "file.0"));
  OK(__wasi_path_unlink_file(dir, "file.999"));
  touch("d/new");
  do total += entries(dir, &cookie, 256, &eof);
  while (!eof);
  EQ(total, 1002);
  ERR(NOTDIR, __wasi_fd_readdir(0, (uint8_t *)name, 1, 0, (__wasi_size_t *)name));
}

static void file_allocate(void) {
  __wasi_filestat_t st;
  __wasi_fd_t fd = must_open("f", __WASI_OFLAGS_CREAT, R(FD_ALLOCATE) | R(FD_FILESTAT_GET));
  uint64_t cases[3][3] = {{0, 100, 100}, {10, 10, 100}, {90, 20, 110}};
  for (int i = 0; i < 3; i++) {
    OK(__wasi_fd_allocate(fd, cases[i][0], cases[i][1]));
    OK(__wasi_fd_filestat_get(fd, &st));
    EQ(st.size, cases[i][2]);
  }
  ERR(INVAL, __wasi_fd_allocate(fd, 0, 0));
  ERR(INVAL, __wasi_fd_allocate(fd, ALL, 2));
  ERR(FBIG, __wasi_fd_allocate(fd, INT64_MAX, INT64_MAX));
  ERR(NOSPC, __wasi_fd_allocate(fd, 0, (uint64_t)1 << 40));
}

static void file_pread_pwrite(void) {
  uint8_t a[2], b[2];
  __wasi_size_t n;
  __wasi_fd_t fd = must_open("f", __WASI_OFLAGS_CREAT, R(FD_READ) | R(FD_SEEK) | R(FD_WRITE));
  __wasi_ciovec_t out[2] = {{(const uint8_t *)"01", 2}, {(const uint8_t *)"23", 2}};
  OK(__wasi_fd_pwrite(fd, out, 2, 0, &n));
  EQ(n, 4);
  __wasi_iovec_t in[2] = {{a, 2}, {b, 2}};
  OK(__wasi_fd_pread(fd, in, 2, 0, &n));
  EQ(n, 4);
  EQ(memcmp(a, "01", 2) || memcmp(b, "23", 2), 0);
  OK(__wasi_fd_pread(fd, in, 2, 2, &n));
  EQ(n, 2);
  EQ(memcmp(a, "23", 2), 0);
  OK(__wasi_fd_pwrite(fd, out, 1, 6, &n));
  OK(__wasi_fd_pread(fd, in, 2, 4, &n));
  EQ(n, 4);
  EQ(a[0] | a[1], 0);
  __wasi_filesize_t at;
  OK(__wasi_fd_tell(fd, &at)); // the right to seek implies that to tell
  EQ(at, 0);
  ERR(INVAL, __wasi_fd_pread(fd, in, 2, ALL, &n));
  ERR(INVAL, __wasi_fd_pwrite(fd, out, 2, INT64_MAX, &n));
  ERR(INVAL, __wasi_fd_read(fd, in, 1025, &n));
  fd = must_open("f", 0, R(FD_READ));
  ERR(NOTCAPABLE, __wasi_fd_pread(fd, in, 1, 0, &n));
  ERR(SPIPE, __wasi_fd_pread(0, in, 1, 0, &n));
}

static void file_seek_tell(void) {
  __wasi_filesize_t at;
  char buf[100] = {0};
  __wasi_size_t n;
  __wasi_fd_t fd = must_open("f", __WASI_OFLAGS_CREAT, R(FD_READ) | R(FD_WRITE) | R(FD_SEEK) | R(FD_TELL));
  OK(__wasi_fd_tell(fd, &at));
  EQ(at, 0);
  OK(wr(fd, "0123456789"));
  OK(__wasi_fd_seek(fd, -5, __WASI_WHENCE_CUR, &at));
  EQ(at, 5);
  OK(__wasi_fd_seek(fd, -2, __WASI_WHENCE_END, &at));
  EQ(at, 8);
  OK(__wasi_fd_seek(fd, 1000, __WASI_WHENCE_CUR, &at));
  EQ(at, 1008);
  ERR(INVAL, __wasi_fd_seek(fd, -2000, __WASI_WHENCE_CUR, &at));
  ERR(INVAL, __wasi_fd_seek(fd, INT64_MAX, __WASI_WHENCE_CUR, &at));
  ERR(INVAL, __wasi_fd_seek(fd, INT64_MIN, __WASI_WHENCE_CUR, &at));
  ERR(INVAL, __wasi_fd_seek(fd, 0, 3, &at));
  OK(rd(fd, buf, 100, &n));
  EQ(n, 0);
  OK(__wasi_fd_seek(fd, 0, __WASI_WHENCE_SET, &at));
  OK(rd(fd, buf, 100, &n));
  OK(__wasi_fd_tell(fd, &at));
  EQ(at, 10);
  fd = must_open("f", 0, R(FD_TELL));
  OK(__wasi_fd_seek(fd, 0, __WASI_WHENCE_CUR, &at));
  ERR(NOTCAPABLE, __wasi_fd_seek(fd, 0, __WASI_WHENCE_SET, &at));
  fd = must_open("f", 0, 0);
  ERR(NOTCAPABLE, __wasi_fd_tell(fd, &at));
}

static void file_truncation(void) {
  char buf[8];
  __wasi_size_t n;
  OK(wr(must_open("f", __WASI_OFLAGS_CREAT, R(FD_WRITE)), "gone"));
  __wasi_fd_t fd = must_open("f", __WASI_OFLAGS_CREAT | __WASI_OFLAGS_TRUNC, R(FD_WRITE) | R(FD_READ));
  OK(rd(fd, buf, 8, &n));
  EQ(n, 0);
  mkdir_("d");
  ERR(ISDIR, try_open("d", 0, __WASI_OFLAGS_TRUNC));
}

static void file_unbuffered_write(void) {
  char buf[1];
  __wasi_size_t n;
  __wasi_fd_t r = must_open("f", __WASI_OFLAGS_CREAT, R(FD_READ));
  OK(wr(must_open("f", 0, R(FD_WRITE)), "x"));
  OK(rd(r, buf, 1, &n));
  EQ(n == 1 && buf[0] == 'x', 1);
}

static void interesting_paths(void) {
  char deep[5000];
  mkdir_("dir");
  mkdir_("dir/nested");
  touch("dir/nested/file");
  __wasi_fd_t sub = open_dir("dir"), fd;
  ERR(NOTCAPABLE, try_open("/dir/nested/file", 0, 0));
  OK(try_open("dir/.//nested/../../dir/nested/../nested///./file", 0, 0));
  ERR(INVAL, open_raw(ROOT, 0, "dir/nested/file", 16, 0, 0, 0, 0, &fd)); // with its zero byte
  ERR(ILSEQ, try_open("dir/\xff", 0, 0));
  ERR(NOTDIR, try_open("dir/nested/file/", 0, 0));
  ERR(NOTDIR, try_open("dir/nested/file///", 0, 0));
  ERR(NOTDIR, try_open("dir/nested/file/.", 0, 0));
  OK(try_open("dir/nested/", 0, 0));
  OK(try_open("dir/nested///", 0, 0));
  ERR(NOTCAPABLE, try_open("dir/nested/../../../x/dir", 0, 0));
  ERR(NOTCAPABLE, try_open("..", 0, 0));
  ERR(NOTCAPABLE, open_at(sub, "nested/../..", 0, 0, 0, 0, &fd));
  ERR(NOENT, try_open("", 0, 0));
  ERR(NOENT, try_open("nope/../dir", 0, 0));
  memset(deep, 'a', sizeof deep);
  deep[256] = 0;
  ERR(NAMETOOLONG, try_open(deep, 0, 0));
  ERR(NAMETOOLONG, __wasi_path_create_directory(ROOT, deep));
  deep[255] = 0;
  OK(__wasi_path_create_directory(ROOT, deep));
  memset(deep, '/', sizeof deep);
  deep[0] = '.';
  deep[4097] = 0;
  ERR(NAMETOOLONG, try_open(deep, 0, 0));
  ERR(FAULT, open_raw(ROOT, 0, (const char *)-8, 16, 0, 0, 0, 0, &fd));
  ERR(INVAL, try_open("dir", 2, 0));
  ERR(INVAL, try_open("dir", 0, 16));
  ERR(INVAL, try_open("new", 0, __WASI_OFLAGS_CREAT | __WASI_OFLAGS_DIRECTORY));
  ERR(ISDIR, try_open("new/", 0, __WASI_OFLAGS_CREAT));
  ERR(ISDIR, try_open("dir", 0, __WASI_OFLAGS_CREAT));
}

static void isatty_(void) {
  for (int fd = 0; fd < 3; fd++) EQ(isatty(fd), 0);
  EQ(isatty(must_open("f", __WASI_OFLAGS_CREAT, 0)), 0);
}

static void nofollow_errors(void) {
  mkdir_("target");
  OK(__wasi_path_symlink("target", ROOT, "s"));
  ERR(LOOP, try_open("s", 0, __WASI_OFLAGS_DIRECTORY));
  ERR(LOOP, try_open("s", 0, 0));
  OK(try_open("s", 1, __WASI_OFLAGS_DIRECTORY));
  OK(try_open("s/", 0, 0));
  OK(__wasi_path_unlink_file(ROOT, "s"));
  OK(__wasi_path_remove_directory(ROOT, "target"));
  touch("target");
  OK(__wasi_path_symlink("target", ROOT, "s"));
  ERR(LOOP, try_open("s", 0, __WASI_OFLAGS_DIRECTORY));
  ERR(LOOP, try_open("s", 0, 0));
  ERR(NOTDIR, try_open("s", 1, __WASI_OFLAGS_DIRECTORY));
  OK(try_open("s", 1, 0));
}

static void path_filestat(void) {
  __wasi_fd_t fd;
  __wasi_fdstat_t fs;
  __wasi_filestat_t a, b;
  OK(open_at(ROOT, "f", 0, __WASI_OFLAGS_CREAT, R(FD_READ) | R(FD_WRITE) | R(PATH_FILESTAT_GET), __WASI_FDFLAGS_APPEND | __WASI_FDFLAGS_SYNC, &fd));
  OK(__wasi_fd_fdstat_get(fd, &fs));
  EQ(fs.fs_flags, __WASI_FDFLAGS_APPEND | __WASI_FDFLAGS_SYNC);
  EQ(fs.fs_rights_base, R(FD_READ) | R(FD_WRITE));
  OK(stat_("f", 0, &a));
  EQ(a.size, 0);
  OK(__wasi_path_filestat_set_times(ROOT, 0, "f", 0, a.mtim - 100, __WASI_FSTFLAGS_MTIM));
  ERR(INVAL, __wasi_path_filestat_set_times(ROOT, 0, "f", 0, 1, __WASI_FSTFLAGS_MTIM | __WASI_FSTFLAGS_MTIM_NOW));
  ERR(INVAL, __wasi_path_filestat_set_times(ROOT, 0, "f", 0, 1, __WASI_FSTFLAGS_ATIM | __WASI_FSTFLAGS_ATIM_NOW));
  OK(stat_("f", 0, &b));
  EQ(b.mtim, a.mtim - 100);
  ERR(NOENT, stat_("g", 0, &b));
  ERR(NOENT, __wasi_path_filestat_set_times(ROOT, 0, "g", 0, 0, 0));
}

static void path_exists(void) {
  __wasi_filestat_t st;
  mkdir_("d");
  touch("d/f");
  OK(__wasi_path_symlink("d/f", ROOT, "l1"));
  OK(__wasi_path_symlink("d", ROOT, "l2"));
  struct { const char *path; int look, type; } cases[] = {
      {"d", 0, 3}, {"d", 1, 3}, {"d/f", 0, 4}, {"d/f", 1, 4}, {"l1", 0, 7}, {"l1", 1, 4}, {"l2", 0, 7}, {"l2", 1, 3}, {"l2/", 0, 3}, {"l2/f", 0, 4}};
  for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
    OK(stat_(cases[i].path, cases[i].look, &st));
    EQ(st.filetype, cases[i].type);
  }
  OK(stat_("d", 0, &st));
  EQ(st.nlink, 2);
  OK(stat_(".", 0, &st));
  EQ(st.nlink, 3);
}

static void path_link(void) {
  __wasi_filestat_t a, b;
  touch("f");
  OK(__wasi_path_link(ROOT, 0, "f", ROOT, "l"));
  OK(stat_("f", 0, &a));
  OK(stat_("l", 0, &b));
  EQ(memcmp(&a, &b, sizeof a), 0);
  EQ(a.nlink, 2);
  mkdir_("d");
  __wasi_fd_t dir = open_dir("d");
  OK(__wasi_path_link(ROOT, 0, "f", dir, "l"));
  ERR(EXIST, __wasi_path_link(ROOT, 0, "f", ROOT, "l"));
  ERR(EXIST, __wasi_path_link(ROOT, 0, "f", ROOT, "f"));
  ERR(EXIST, __wasi_path_link(ROOT, 0, "f", ROOT, "d"));
  ERR(PERM, __wasi_path_link(ROOT, 0, "d", ROOT, "e"));
  ERR(NOENT, __wasi_path_link(ROOT, 0, "f", ROOT, "m/"));
  ERR(NOENT, __wasi_path_link(ROOT, 0, "g", ROOT, "m"));
  OK(__wasi_path_symlink("target", ROOT, "s"));
  OK(__wasi_path_link(ROOT, 0, "s", ROOT, "s2"));
  OK(stat_("s2", 0, &a));
  EQ(a.filetype == __WASI_FILETYPE_SYMBOLIC_LINK && a.nlink == 2, 1);
  ERR(EXIST, __wasi_path_link(ROOT, 0, "f", ROOT, "s"));
  ERR(NOENT, __wasi_path_link(ROOT, 1, "s", ROOT, "m"));
  touch("target");
  OK(__wasi_path_link(ROOT, 1, "s", ROOT, "m"));
  OK(__wasi_path_symlink("loop", ROOT, "loop"));
  OK(__wasi_path_link(ROOT, 0, "loop", ROOT, "loop2"));
  ERR(LOOP, __wasi_path_link(ROOT, 1, "loop", ROOT, "n"));
}

static void path_open_modes(void) {
  char buf[8];
  __wasi_size_t n;
  __wasi_fdstat_t st;
  __wasi_fd_t fd;
  touch("f");
  ERR(EXIST, try_open("f", 0, __WASI_OFLAGS_CREAT | __WASI_OFLAGS_EXCL));
  ERR(NOENT, try_open("g", 0, 0));
  fd = must_open("f", 0, 0);
  ERR(NOTDIR, open_at(fd, "x", 0, __WASI_OFLAGS_CREAT, 0, 0, &fd));
  ERR(BADF, rd(must_open("f", 0, 0), buf, 8, &n));
  fd = must_open("f", 0, R(FD_READ));
  OK(rd(fd, buf, 8, &n));
  ERR(BADF, wr(fd, "x"));
  fd = must_open("f", 0, R(FD_WRITE));
  OK(wr(fd, "xyz"));
  ERR(BADF, rd(fd, buf, 8, &n));
  fd = must_open("f", 0, R(FD_READ) | R(FD_WRITE));
  OK(rd(fd, buf, 8, &n));
  EQ(n, 3);
  OK(wr(fd, "tuv"));
  OK(open_at(ROOT, ".", 0, 0, 0, __WASI_FDFLAGS_NONBLOCK, &fd));
  ERR(INVAL, open_at(ROOT, ".", 0, 0, 0, 32, &fd));
  // The preopened directory has what toolchains expect, and no more.
  OK(__wasi_fd_fdstat_get(ROOT, &st));
  EQ(st.fs_rights_base & (R(FD_READ) | R(FD_WRITE) | R(FD_SEEK) | R(FD_FILESTAT_SET_SIZE)), 0);
  OK(__wasi_path_open(ROOT, 0, ".", 0, st.fs_rights_base, st.fs_rights_inheriting, 0, &fd));
  OK(open_at(ROOT, ".", 0, __WASI_OFLAGS_DIRECTORY, R(FD_READ), 0, &fd));
  ERR(ISDIR, open_at(ROOT, ".", 0, __WASI_OFLAGS_DIRECTORY, R(FD_READ) | R(FD_WRITE), 0, &fd));
}

static void path_rename(void) {
  mkdir_("source");
  OK(__wasi_path_rename(ROOT, "source", ROOT, "target"));
  ERR(NOENT, try_open("source", 0, __WASI_OFLAGS_DIRECTORY));
  OK(try_open("target", 0, __WASI_OFLAGS_DIRECTORY));
  mkdir_("source");
  OK(__wasi_path_rename(ROOT, "source", ROOT, "target"));
  ERR(NOENT, __wasi_path_rename(ROOT, "source", ROOT, "target"));
  mkdir_("source");
  touch("target/file");
  ERR(NOTEMPTY, __wasi_path_rename(ROOT, "source", ROOT, "target"));
  ERR(NOTDIR, __wasi_path_rename(ROOT, "source", ROOT, "target/file"));
  ERR(INVAL, __wasi_path_rename(ROOT, "source", ROOT, "source/inside"));
  ERR(NOTEMPTY, __wasi_path_rename(ROOT, "target/file", ROOT, "target"));
  ERR(BUSY, __wasi_path_rename(ROOT, "source/.", ROOT, "x"));
  OK(__wasi_path_rename(ROOT, "target/file", ROOT, "f"));
  touch("g");
  OK(__wasi_path_rename(ROOT, "f", ROOT, "g"));
  ERR(NOENT, try_open("f", 0, 0));
  ERR(ISDIR, __wasi_path_rename(ROOT, "g", ROOT, "source"));
  OK(__wasi_path_link(ROOT, 0, "g", ROOT, "h"));
  OK(__wasi_path_rename(ROOT, "g", ROOT, "h"));
  OK(try_open("g", 0, 0));
  ERR(NOTDIR, __wasi_path_rename(ROOT, "g/", ROOT, "i"));
  ERR(NOTDIR, __wasi_path_rename(ROOT, "g", ROOT, "i/"));
  ERR(NOTCAPABLE, __wasi_path_rename(ROOT, "g", ROOT, "../i"));
}

static void path_rename_dir_trailing_slashes(void) {
  mkdir_("source");
  OK(__wasi_path_rename(ROOT, "source/", ROOT, "target"));
  OK(__wasi_path_rename(ROOT, "target", ROOT, "source/"));
  OK(__wasi_path_rename(ROOT, "source/", ROOT, "target/"));
  OK(__wasi_path_rename(ROOT, "target", ROOT, "source"));
}

static void path_symlink_trailing_slashes(void) {
  ERR(NOENT, __wasi_path_symlink("source", ROOT, "target/"));
  OK(__wasi_path_symlink("source", ROOT, "target"));
  OK(__wasi_path_unlink_file(ROOT, "target"));
  mkdir_("target");
  ERR(EXIST, __wasi_path_symlink("source", ROOT, "target/"));
  ERR(EXIST, __wasi_path_symlink("source", ROOT, "target"));
  OK(__wasi_path_remove_directory(ROOT, "target"));
  touch("target");
  ERR(NOTDIR, __wasi_path_symlink("source", ROOT, "target/"));
  ERR(EXIST, __wasi_path_symlink("source", ROOT, "target"));
}

static __wasi_subscription_t on_fd(uint64_t id, int tag, int fd) {
  __wasi_subscription_t s = {.userdata = id};
  s.u.tag = tag;
  s.u.u.fd_read.file_descriptor = fd;
  return s;
}
static __wasi_subscription_t on_clock(uint64_t id, int clock, uint64_t timeout, int flags) {
  __wasi_subscription_t s = {.userdata = id};
  s.u.tag = __WASI_EVENTTYPE_CLOCK;
  s.u.u.clock.id = clock;
  s.u.u.clock.timeout = timeout;
  s.u.u.clock.flags = flags;
  return s;
}

static void poll_oneoff(void) {
  __wasi_size_t n;
  __wasi_event_t ev[8];
  __wasi_timestamp_t now;
  ERR(INVAL, __wasi_poll_oneoff(NULL, ev, 0, &n));
  __wasi_subscription_t a[] = {on_clock(1, 1, 200000000, 0), on_fd(2, __WASI_EVENTTYPE_FD_READ, 0),
                               on_fd(3, __WASI_EVENTTYPE_FD_WRITE, 1), on_fd(4, __WASI_EVENTTYPE_FD_WRITE, 2),
                               on_fd(5, __WASI_EVENTTYPE_FD_READ, 77), on_fd(6, __WASI_EVENTTYPE_FD_READ, 1),
                               on_clock(7, 3, 1, 0)};
  OK(__wasi_poll_oneoff(a, ev, 7, &n));
  EQ(n, 6);
  int want[] = {0, 0, 0, __WASI_ERRNO_BADF, __WASI_ERRNO_BADF, __WASI_ERRNO_NOTSUP};
  for (int i = 0; i < 6; i++) {
    EQ(ev[i].userdata, i + 2);
    EQ(ev[i].error, want[i]);
  }
  // Sleeping: the shortest is due, an absolute time in the past is at once.
  __wasi_subscription_t b[] = {on_clock(1, 1, 2000, 0), on_clock(2, 0, 1000, 0), on_clock(3, 1, 3000, 0)};
  OK(__wasi_poll_oneoff(b, ev, 3, &n));
  EQ(n == 1 && ev[0].userdata == 2 && ev[0].type == __WASI_EVENTTYPE_CLOCK && ev[0].error == 0, 1);
  OK(__wasi_clock_time_get(0, 0, &now));
  b[0] = on_clock(3, 0, now - 5, 1);
  OK(__wasi_poll_oneoff(b, ev, 2, &n));
  EQ(n == 1 && ev[0].userdata == 3, 1);
  b[0].u.tag = 9;
  ERR(INVAL, __wasi_poll_oneoff(b, ev, 2, &n));
  ERR(INVAL, __wasi_poll_oneoff(b, ev, 4097, &n));
  ERR(FAULT, __wasi_poll_oneoff((void *)-64, ev, 2, &n));
  // A regular file tells how much is left.
  OK(wr(must_open("f", __WASI_OFLAGS_CREAT, R(FD_WRITE)), "12345"));
  b[0] = on_fd(8, __WASI_EVENTTYPE_FD_READ, must_open("f", 0, R(FD_READ) | R(POLL_FD_READWRITE)));
  b[1] = on_fd(9, __WASI_EVENTTYPE_FD_READ, must_open("f", 0, R(FD_READ)));
  OK(__wasi_poll_oneoff(b, ev, 2, &n));
  EQ(n == 2 && ev[0].fd_readwrite.nbytes == 5 && ev[1].error == __WASI_ERRNO_NOTCAPABLE, 1);
}

static void readlink_(void) {
  uint8_t buf[10] = {0};
  __wasi_size_t n;
  OK(__wasi_path_symlink("target", ROOT, "s"));
  OK(__wasi_path_readlink(ROOT, "s", buf, 10, &n));
  EQ(n == 6 && memcmp(buf, "target\0\0\0\0", 10) == 0, 1);
  memset(buf, 0, 10);
  OK(__wasi_path_readlink(ROOT, "s", buf, 4, &n));
  EQ(n == 4 && memcmp(buf, "targ\0", 5) == 0, 1);
  touch("f");
  ERR(INVAL, __wasi_path_readlink(ROOT, "f", buf, 10, &n));
  ERR(NOENT, __wasi_path_readlink(ROOT, "g", buf, 10, &n));
}

static void remove_directory(void) {
  mkdir_("d");
  OK(__wasi_path_remove_directory(ROOT, "d"));
  mkdir_("d");
  OK(__wasi_path_remove_directory(ROOT, "d/"));
  touch("f");
  ERR(NOTDIR, __wasi_path_remove_directory(ROOT, "f"));
  ERR(NOTDIR, __wasi_path_remove_directory(ROOT, "f/"));
  mkdir_("d");
  mkdir_("d/nested");
  ERR(NOTEMPTY, __wasi_path_remove_directory(ROOT, "d"));
  ERR(INVAL, __wasi_path_remove_directory(ROOT, "d/."));
  ERR(NOTEMPTY, __wasi_path_remove_directory(ROOT, "d/nested/.."));
  OK(__wasi_path_remove_directory(ROOT, "d/nested"));
  OK(__wasi_path_symlink("d", ROOT, "s"));
  ERR(NOTDIR, __wasi_path_remove_directory(ROOT, "s"));
  ERR(NOTDIR, __wasi_path_remove_directory(ROOT, "s/"));
  ERR(NOENT, __wasi_path_remove_directory(ROOT, "x"));
}

static void renumber(void) {
  __wasi_fdstat_t a, b;
  __wasi_fd_t from = must_open("f1", __WASI_OFLAGS_CREAT, R(FD_READ) | R(FD_WRITE));
  OK(__wasi_fd_fdstat_get(from, &a));
  __wasi_fd_t to = must_open("f2", __WASI_OFLAGS_CREAT, R(FD_READ));
  OK(__wasi_fd_renumber(from, to));
  ERR(BADF, __wasi_fd_close(from));
  OK(__wasi_fd_fdstat_get(to, &b));
  EQ(memcmp(&a, &b, sizeof a), 0);
  ERR(BADF, __wasi_fd_renumber(to, from));
  ERR(BADF, __wasi_fd_renumber(from, to));
  OK(__wasi_fd_renumber(to, to));
  EQ(must_open("f1", 0, 0), from);
}

static void stdio_(void) {
  for (int fd = 0; fd < 3; fd++) {
    __wasi_fdstat_t st;
    __wasi_filesize_t at;
    OK(__wasi_fd_fdstat_get(fd, &st));
    EQ(st.fs_filetype, __WASI_FILETYPE_UNKNOWN);
    ERR(SPIPE, __wasi_fd_seek(fd, 0, 1, &at));
    ERR(INVAL, __wasi_fd_sync(fd));
    __wasi_fd_t to = must_open("f", __WASI_OFLAGS_CREAT, 0);
    OK(__wasi_fd_renumber(fd, to));
    OK(__wasi_fd_fdstat_get(to, &st));
    ERR(BADF, __wasi_fd_fdstat_get(fd, &st));
    OK(__wasi_path_unlink_file(ROOT, "f"));
    OK(__wasi_fd_renumber(to, must_open("f", __WASI_OFLAGS_CREAT, 0)));
  }
}

static void symlink_create(void) {
  touch("target");
  OK(__wasi_path_symlink("target", ROOT, "s"));
  OK(try_open("s", 1, 0));
  ERR(NOTCAPABLE, __wasi_path_symlink("/", ROOT, "abs"));
  ERR(NOENT, __wasi_path_symlink("", ROOT, "empty"));
  OK(__wasi_path_symlink("../escape", ROOT, "out"));
  ERR(NOTCAPABLE, try_open("out", 1, 0));
  ERR(NOTCAPABLE, try_open("out/x", 0, 0));
}

static void symlink_filestat(void) {
  __wasi_filestat_t f, s, t;
  touch("f");
  OK(__wasi_path_symlink("f", ROOT, "s"));
  OK(stat_("f", 0, &f));
  OK(stat_("s", 0, &s));
  EQ(s.size, 1);
  OK(__wasi_path_filestat_set_times(ROOT, 0, "s", 0, s.mtim - 200, __WASI_FSTFLAGS_MTIM));
  OK(stat_("s", 0, &t));
  EQ(t.mtim, s.mtim - 200);
  OK(stat_("s", 1, &t));
  EQ(t.mtim, f.mtim);
  OK(__wasi_path_filestat_set_times(ROOT, 1, "s", 0, 12345, __WASI_FSTFLAGS_MTIM));
  OK(stat_("f", 0, &t));
  EQ(t.mtim, 12345);
}

static void symlink_loop(void) {
  char name[8], next[8];
  OK(__wasi_path_symlink("s", ROOT, "s"));
  ERR(LOOP, try_open("s", 0, 0));
  ERR(LOOP, try_open("s", 1, 0));
  ERR(LOOP, try_open("s/x", 0, 0));
  touch("l0");
  for (int i = 1; i <= 41; i++) {
    snprintf(name, 8, "l%d", i);
    snprintf(next, 8, "l%d", i - 1);
    OK(__wasi_path_symlink(next, ROOT, name));
  }
  OK(try_open("l40", 1, 0));
  ERR(LOOP, try_open("l41", 1, 0));
}

static void truncation_rights(void) {
  __wasi_fdstat_t st;
  touch("f");
  OK(__wasi_fd_fdstat_get(ROOT, &st));
  EQ(st.fs_flags, 0);
  OK(try_open("f", 0, __WASI_OFLAGS_TRUNC));
  OK(__wasi_fd_fdstat_set_rights(ROOT, st.fs_rights_base, st.fs_rights_inheriting & ~R(FD_FILESTAT_SET_SIZE)));
  OK(try_open("f", 0, __WASI_OFLAGS_TRUNC));
  OK(__wasi_fd_fdstat_set_rights(ROOT, st.fs_rights_base & ~R(PATH_FILESTAT_SET_SIZE), 0));
  ERR(NOTCAPABLE, try_open("f", 0, __WASI_OFLAGS_TRUNC));
}

static void unlink_file_trailing_slashes(void) {
  mkdir_("d");
  ERR(ISDIR, __wasi_path_unlink_file(ROOT, "d"));
  ERR(ISDIR, __wasi_path_unlink_file(ROOT, "d/"));
  touch("f");
  ERR(NOTDIR, __wasi_path_unlink_file(ROOT, "f/"));
  OK(__wasi_path_unlink_file(ROOT, "f"));
  ERR(NOENT, __wasi_path_unlink_file(ROOT, "f"));
}

static void sockets(void) {
  __wasi_size_t n;
  __wasi_roflags_t fl;
  __wasi_fd_t fd;
  ERR(NOTSOCK, __wasi_sock_shutdown(1, __WASI_SDFLAGS_RD));
  ERR(BADF, __wasi_sock_shutdown(77, __WASI_SDFLAGS_RD));
  ERR(NOTSOCK, __wasi_sock_accept(ROOT, 0, &fd));
  ERR(NOTSOCK, __wasi_sock_recv(0, NULL, 0, 0, &n, &fl));
  ERR(BADF, __wasi_sock_send(78, NULL, 0, 0, &n));
}

static void misc(void) {
  ERR(BADF, wr(77, "x"));
  ERR(BADF, wr(0, "x"));
  ERR(BADF, __wasi_fd_close(77));
  ERR(BADF, __wasi_fd_close(-1));
  OK(__wasi_sched_yield());
  EQ(raise_raw(9), __WASI_ERRNO_NOSYS);
  __wasi_fd_t fd = must_open("f", __WASI_OFLAGS_CREAT, R(FD_SYNC));
  OK(__wasi_fd_sync(fd));
  ERR(NOTCAPABLE, __wasi_fd_datasync(fd));
  OK(__wasi_fd_sync(ROOT));
}

static void fstflags_validate(void) { fd_filestat_set(); }
static void exit_33(void) { __wasi_proc_exit(33); }

#define TEST(f) {#f, f}
static struct { const char *name; void (*run)(void); } tests[] = {
    TEST(big_random_buf), TEST(clocks), TEST(close_preopen), TEST(overwrite_preopen), TEST(dangling_fd), TEST(dangling_symlink),
    TEST(dir_fd_op_failures), TEST(directory_seek), TEST(fd_advise), TEST(fd_fdstat_set_rights), TEST(fd_filestat_set),
    TEST(fd_flags_set), TEST(fd_readdir), TEST(file_allocate), TEST(file_pread_pwrite), TEST(file_seek_tell), TEST(file_truncation),
    TEST(file_unbuffered_write), TEST(fstflags_validate), TEST(interesting_paths), TEST(isatty_), TEST(nofollow_errors),
    TEST(path_filestat), TEST(path_exists), TEST(path_link), TEST(path_open_modes), TEST(path_rename),
    TEST(path_rename_dir_trailing_slashes), TEST(path_symlink_trailing_slashes), TEST(poll_oneoff), TEST(readlink_),
    TEST(remove_directory), TEST(renumber), TEST(stdio_), TEST(symlink_create), TEST(symlink_filestat), TEST(symlink_loop),
    TEST(truncation_rights), TEST(unlink_file_trailing_slashes), TEST(sockets), TEST(misc), TEST(exit_33)};

int main(int argc, char **argv) {
  for (unsigned i = 0; i < sizeof tests / sizeof *tests; i++) {
    if (argc < 2)
      puts(tests[i].name);
    else if (strcmp(argv[1], tests[i].name) == 0)
      return tests[i].run(), 0;
  }
  return argc < 2 ? 0 : 2;
}
