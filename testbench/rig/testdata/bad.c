// A guest that counts and sums its readings, JSON lines, like counter.c, but while
// it has fewer than 50 of them it does what its first argument says instead.
// A filter, which has its counts in a file; with REACTOR a reactor, which has them
// in its memory. What it writes before it misbehaves must never be seen again.
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <wasi/api.h>

enum { ENOUGH = 50 };

static unsigned long long count, sum;
static char *mode = "";
static size_t extra; // bytes of results that are none

static void loop(void) {
  for (;;)
    __asm__ volatile("");
}

static void fill(void) {
  static char block[65536];
  for (int n = 0;; n++) {
    char name[32];
    snprintf(name, sizeof name, "fill%d", n);
    int f = open(name, O_CREAT | O_WRONLY, 0600);
    if (f < 0) {
      fprintf(stderr, "file %d: %s\n", n, strerror(errno));
      exit(4);
    }
    while (n % 2 == 0 && write(f, block, sizeof block) > 0)
      ;
    close(f);
  }
}

static void misbehave(void) {
  fprintf(stderr, "now I do %s\n", mode);
  count += 1000000;
  if (!strcmp(mode, "loop"))
    loop();
  if (!strcmp(mode, "alloc"))
    for (size_t n = 1 << 16;;) {
      char *volatile p = malloc(n);
      if (!p)
        abort();
      memset(p, 1, n);
    }
  if (!strcmp(mode, "trap"))
    __builtin_trap();
  if (!strcmp(mode, "stdout"))
    extra = 1 << 30;
  if (!strcmp(mode, "stderr"))
    for (;;)
      fprintf(stderr, "and on and on it goes\n");
  if (!strcmp(mode, "fill"))
    fill();
  if (!strcmp(mode, "exit"))
    exit(3);
  if (!strcmp(mode, "sleep"))
    sleep(3600);
}

// reached is a result: whether something outside of the guest could be had.
static void reached(FILE *out, const char *what, int n, int yes) {
  fprintf(out, "{\"n\":\"reach/%s/%d\",\"vb\":%s}\n", what, n, yes ? "true" : "false");
}

static void reach(FILE *out) {
  static const char *paths[] = {
    "/etc/passwd", "etc/passwd", "../etc/passwd", "/../../../../etc/passwd", "/models/../../etc/passwd", "/proc/self/mem",
    "/proc/1/environ", "/dev/tpmrm0", "/dev/mem", "/dev/fd/3", "/sys/kernel", "/run", "/tmp", "/root", "//etc//passwd", "./../.", "link",
  };
  symlink("../../../etc/passwd", "link");
  for (int i = 0; i < (int)(sizeof paths / sizeof *paths); i++) {
    int f = open(paths[i], O_RDONLY), d = open(paths[i], O_RDONLY | O_DIRECTORY), w = open(paths[i], O_WRONLY);
    struct stat st;
    int s = stat(paths[i], &st);
    // the way above its directory leads back into it, at most
    reached(out, "path", i, f >= 0 && !d || w >= 0 || s == 0 && !S_ISDIR(st.st_mode) && !S_ISLNK(st.st_mode));
  }
  DIR *d = opendir("/");
  for (struct dirent *e; d && (e = readdir(d));)
    if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..") && strcmp(e->d_name, "state") && strcmp(e->d_name, "link") && strcmp(e->d_name, "models"))
      reached(out, "root", 0, 1);
  for (int fd = 3; fd < 64; fd++) {
    __wasi_fd_t got;
    char buf[8];
    __wasi_ciovec_t v = {(uint8_t *)"x", 1};
    __wasi_size_t n;
    int yes = __wasi_sock_accept(fd, 0, &got) == 0 || __wasi_sock_send(fd, &v, 1, 0, &n) == 0 || read(fd, buf, sizeof buf) >= 0;
    for (int up = 0; up < 2 && !yes; up++)
      yes = __wasi_path_open(fd, 0, up ? "/etc/passwd" : "../etc/passwd", 0, __WASI_RIGHTS_FD_READ, 0, 0, &got) == 0;
    reached(out, "fd", fd, yes);
  }
  __wasi_size_t n = 1, size = 1;
  reached(out, "environ", 0, __wasi_environ_sizes_get(&n, &size) == 0 && (n || size));
  reached(out, "PATH", 0, getenv("PATH") != NULL);
}

// batch takes readings and writes results.
static void batch(char *p, size_t n, FILE *out) {
  for (char *end = p + n; p < end;) {
    char *nl = memchr(p, '\n', end - p);
    if (!nl)
      exit(5);
    *nl = 0;
    char *v = strstr(p, "\"v\":");
    if (!v)
      exit(6);
    sum += strtoull(v + 4, 0, 10);
    count++;
    p = nl + 1;
  }
  fprintf(out, "{\"n\":\"count\",\"v\":%llu}\n{\"n\":\"sum\",\"v\":%llu}\n", count, sum);
  if (!strcmp(mode, "reach"))
    reach(out);
  else if (count < ENOUGH) {
    if (!strcmp(mode, "malformed"))
      fprintf(out, "{\"n\":\"leak\",\"v\":}\n");
    misbehave();
  }
}

#ifdef REACTOR
static char *in, *out;
static size_t room, size;

static void arguments(void) {
  static char *argv[8], buf[256];
  if (!*mode && __wasi_args_get((uint8_t **)argv, (uint8_t *)buf) == 0)
    mode = argv[1];
}

__attribute__((export_name("edgekeep_alloc"))) void *edgekeep_alloc(uint32_t n) {
  if (n > room) {
    in = realloc(in, n);
    room = n;
  }
  return in;
}

__attribute__((export_name("edgekeep_batch"))) uint64_t edgekeep_batch(char *p, uint32_t n) {
  arguments();
  free(out);
  FILE *f = open_memstream(&out, &size);
  extra = 0;
  batch(p, n, f);
  fclose(f);
  return (uint64_t)(uintptr_t)out << 32 | (uint32_t)(size + extra);
}
#else
int main(int argc, char **argv) {
  static char in[1 << 20];
  size_t n = 0, k;
  if (argc > 1)
    mode = argv[1];
  while ((k = fread(in + n, 1, sizeof in - n, stdin)) > 0)
    n += k;
  FILE *f = fopen("state", "r");
  if (f && fscanf(f, "%llu %llu", &count, &sum) != 2)
    return 7;
  if (f)
    fclose(f);
  batch(in, n, stdout);
  f = fopen("state", "w");
  if (!f || fprintf(f, "%llu %llu", count, sum) < 0 || fclose(f))
    return 8;
  while (extra > 0 && puts("{\"n\":\"leak\",\"v\":1}") >= 0)
    ;
  return 0;
}
#endif
