// A reactor that keeps files open between its calls.
#include <assert.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define EXPORT(name) __attribute__((export_name(#name)))

static int log_fd, ghost_fd, model_fd;
static DIR *dir;
static uint64_t last;
static int calls;

static uint64_t now(void) {
  struct timespec ts;
  assert(clock_gettime(CLOCK_MONOTONIC, &ts) == 0);
  return (uint64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

EXPORT(setup) void setup(void) {
  log_fd = open("/log", O_CREAT | O_RDWR | O_APPEND);
  ghost_fd = open("/ghost", O_CREAT | O_RDWR);
  model_fd = open("/models/m", O_RDONLY);
  assert(log_fd > 0 && ghost_fd > 0 && model_fd > 0);
  assert(write(ghost_fd, "boo", 3) == 3 && lseek(ghost_fd, 1, SEEK_SET) == 1);
  assert(unlink("/ghost") == 0);
  char c;
  assert(read(model_fd, &c, 1) == 1 && c == 'm');
  for (int i = 0; i < 500; i++) {
    char name[16];
    snprintf(name, sizeof name, "/e%03d", i);
    close(open(name, O_CREAT | O_WRONLY));
  }
  dir = opendir("/");
  assert(dir != NULL);
  for (int i = 0; i < 10; i++) assert(readdir(dir) != NULL);
  last = now();
}

// step appends to the log and returns how many names of the directory are left.
EXPORT(step) int step(void) {
  char c;
  uint64_t t = now();
  assert(t > last);
  last = t;
  assert(dprintf(log_fd, "%d\n", calls++) > 0);
  if (calls == 2) {
    assert(read(ghost_fd, &c, 1) == 1 && c == 'o');
    assert(read(model_fd, &c, 1) == 1 && c == 'o');
    int left = 0;
    while (readdir(dir) != NULL) left++;
    return left;
  }
  return 0;
}

EXPORT(doze) void doze(void) {
  struct timespec forever = {1000000000, 0};
  nanosleep(&forever, NULL);
}
