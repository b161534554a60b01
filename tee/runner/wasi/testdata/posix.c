// wasi-libc on this host. argv[1] chooses: "files" works in "/" and reads
// "/models/m", "bare" has no directory at all, "echo" copies stdin to stdout.
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static void put(const char *path, const char *text) {
  FILE *f = fopen(path, "w");
  assert(f != NULL);
  assert(fputs(text, f) >= 0);
  assert(fclose(f) == 0);
}

static void seek_and_read(void) {
  char buf[8];
  put("/lseek.txt", "01234567");
  FILE *f = fopen("/lseek.txt", "r");
  assert(f != NULL && fread(buf, 1, 4, f) == 4);
  fflush(f);
  assert(lseek(fileno(f), 0, SEEK_CUR) == 4);
  assert(fread(buf, 1, 1, f) == 1 && buf[0] == '4');
  fflush(f);
  assert(lseek(fileno(f), 0, SEEK_CUR) == 5);
  assert(lseek(fileno(f), 0, SEEK_END) == 8);
  assert(pread(fileno(f), buf, 3, 4) == 3 && memcmp(buf, "456", 3) == 0);
  assert(write(fileno(f), "x", 1) == -1 && errno == EBADF);
  fclose(f);
}

static void append(void) {
  int fd = open("/append", O_CREAT | O_TRUNC | O_WRONLY | O_APPEND);
  assert(fd > 0 && write(fd, "ab", 2) == 2);
  assert(lseek(fd, 0, SEEK_SET) == 0 && write(fd, "cd", 2) == 2);
  assert(lseek(fd, 0, SEEK_CUR) == 4);
  assert(pwrite(fd, "xyz", 3, 0) == 3);
  assert(lseek(fd, 0, SEEK_CUR) == 4 && lseek(fd, 0, SEEK_END) == 4);
  close(fd);
  fd = open("/pwrite", O_WRONLY | O_CREAT);
  assert(pwrite(fd, "very long text", 14, 0) == 14 && pwrite(fd, "test", 4, 3) == 4);
  close(fd);
  char buf[16];
  fd = open("/pwrite", O_RDONLY);
  assert(read(fd, buf, 16) == 14 && memcmp(buf, "vertestng text", 14) == 0);
  close(fd);
}

static void directories(void) {
  assert(mkdir("/d", 0777) == 0);
  assert(mkdir("/d", 0777) == -1 && errno == EEXIST);
  put("/d/file-0", "");
  put("/d/file-1", "one");
  int dfd = open("/d", O_RDONLY | O_DIRECTORY), seen = 0;
  DIR *d = fdopendir(dfd);
  assert(d != NULL);
  for (struct dirent *e; (e = readdir(d)) != NULL;) {
    struct stat st;
    if (e->d_name[0] == '.') continue;
    assert(fstatat(dfd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0);
    assert(st.st_ino == e->d_ino && e->d_type == DT_REG);
    seen++;
  }
  assert(seen == 2);
  closedir(d);
  struct stat a, b;
  assert(stat("/d/file-0", &a) == 0 && stat("/d/file-1", &b) == 0);
  assert(a.st_dev == b.st_dev && a.st_ino != b.st_ino && b.st_size == 3 && S_ISREG(a.st_mode));
  assert(chdir("/d") == 0 && access("file-1", R_OK) == 0);
  assert(rename("file-1", "../moved") == 0 && access("/moved", F_OK) == 0);
  assert(link("/moved", "/hard") == 0 && symlink("moved", "/soft") == 0);
  assert(stat("/hard", &a) == 0 && a.st_nlink == 2);
  assert(lstat("/soft", &a) == 0 && S_ISLNK(a.st_mode));
  assert(stat("/soft", &a) == 0 && a.st_size == 3);
  char buf[8];
  assert(readlink("/soft", buf, 8) == 5 && memcmp(buf, "moved", 5) == 0);
  assert(rmdir("/d") == -1 && errno == ENOTEMPTY);
  assert(unlink("/d") == -1 && errno == EISDIR);
  assert(remove("/d/file-0") == 0 && remove("/d") == 0);
  assert(truncate("/moved", 1) == 0 && stat("/hard", &a) == 0 && a.st_size == 1);
  assert(symlink("/absolute", "/abs") == -1);
  assert(open("/loop/x", O_RDONLY) == -1 && errno == ENOENT);
  assert(symlink("loop", "/loop") == 0 && open("/loop", O_RDONLY) == -1 && errno == ELOOP);
}

static void models(void) {
  char buf[16];
  int fd = open("/models/m", O_RDONLY);
  assert(fd > 0 && read(fd, buf, 16) == 5 && memcmp(buf, "model", 5) == 0);
  close(fd);
  assert(open("/models/m", O_RDWR) == -1 && errno == EROFS);
  assert(open("/models/m", O_WRONLY | O_TRUNC) == -1 && errno == EROFS);
  assert(open("/models/new", O_WRONLY | O_CREAT) == -1 && errno == EROFS);
  assert(unlink("/models/m") == -1 && errno == EROFS);
  assert(mkdir("/models/d", 0777) == -1 && errno == EROFS);
  assert(rename("/models/m", "/models/n") == -1 && errno == EROFS);
  assert(rename("/models/m", "/m") == -1 && errno == EXDEV);
  assert(link("/models/m", "/m") == -1 && errno == EXDEV);
  assert(access("/models/sub/deep", R_OK) == 0);
}

static void times(void) {
  struct timespec ts, req = {0, 5000000};
  assert(clock_getres(CLOCK_MONOTONIC, &ts) == 0 && clock_getres(CLOCK_REALTIME, &ts) == 0);
  assert(clock_gettime(CLOCK_MONOTONIC, &ts) == 0 && clock_gettime(CLOCK_REALTIME, &ts) == 0);
  assert(ts.tv_sec > 1000000000);
  assert(nanosleep(&req, NULL) == 0);
}

static void bare(void) {
  assert(fopen("fs-tests.dir/file", "r") == NULL && errno == ENOTCAPABLE);
  assert(shutdown(3, SHUT_RD) != 0 && errno == EBADF);
  assert(shutdown(1, SHUT_RD) != 0 && errno == ENOTSOCK);
}

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "files") == 0) {
    seek_and_read();
    append();
    directories();
    models();
    times();
    puts("well");
  } else if (argc > 1 && strcmp(argv[1], "bare") == 0) {
    bare();
  } else if (argc > 1 && strcmp(argv[1], "echo") == 0) {
    for (int c; (c = getchar()) != EOF;) putchar(c);
    fputs("to stderr", stderr);
  } else {
    for (int i = 0; i < argc; i++) puts(argv[i]);
    for (char **e = environ; *e; e++) puts(*e);
  }
  return 0;
}
