// A reactor that counts and sums the readings it gets, in JSON lines, and says
// after each batch how far it is. MB megabytes of its memory are touched in turn,
// one page a batch, so that there is something to move.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef MB
#define MB 0
#endif

static unsigned long long count, sum, turn;
static char *in, out[256];
static size_t room;
static unsigned char ballast[MB * 1024 * 1024 + 1];

__attribute__((export_name("edgekeep_alloc"))) void *edgekeep_alloc(uint32_t n) {
  if (n > room) {
    in = realloc(in, n);
    room = n;
  }
  return in;
}

__attribute__((export_name("edgekeep_batch"))) uint64_t edgekeep_batch(char *p, uint32_t n) {
  if (MB > 0 && turn == 0)
    for (size_t i = 0; i < sizeof ballast; i += 64)
      ballast[i] = (unsigned char)(i * 2654435761u >> 13) | 1;
  for (char *end = p + n; p < end;) {
    char *nl = memchr(p, '\n', end - p);
    if (!nl)
      return (uint64_t)-1;
    *nl = 0;
    char *v = strstr(p, "\"v\":");
    if (!v)
      return (uint64_t)-1;
    sum += strtoull(v + 4, 0, 10);
    count++;
    p = nl + 1;
  }
  if (MB > 0)
    ballast[(turn * 4096 * 7) % sizeof ballast]++;
  turn++;
  int len = snprintf(out, sizeof out, "{\"n\":\"count\",\"v\":%llu}\n{\"n\":\"sum\",\"v\":%llu}\n", count, sum);
  return (uint64_t)(uintptr_t)out << 32 | (uint32_t)len;
}
