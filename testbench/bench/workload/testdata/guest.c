// The guest of the measurements: a reactor that counts the readings it gets, as
// JSON lines, and says after each batch how many they were. A batch that begins
// with "spin N" computes for N rounds instead. MB megabytes of its memory hold
// something from its first batch on, of which each later one changes 2 pages.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef MB
#define MB 0
#endif

static unsigned long long count, turn;
static volatile unsigned long long sink;
static char *in, out[64];
static size_t room;
static unsigned char ballast[MB * 1024 * 1024 + 1];

__attribute__((export_name("edgekeep_alloc"))) void *edgekeep_alloc(uint32_t n) {
  if (n + 1 > room)
    in = realloc(in, room = n + 1);
  return in;
}

static unsigned long long spin(unsigned long long rounds) {
  unsigned long long x = 88172645463325252ULL;
  for (unsigned long long i = 0; i < rounds; i++) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
  }
  return x;
}

__attribute__((export_name("edgekeep_batch"))) uint64_t edgekeep_batch(char *p, uint32_t n) {
  p[n] = 0;
  if (turn == 0)
    for (size_t i = 0; i < sizeof ballast; i += 64)
      ballast[i] = (unsigned char)(i * 2654435761u >> 13) | 1;
  for (int i = 0; MB > 0 && i < 2; i++)
    ballast[((turn * 2 + i) * 4096 * 7) % sizeof ballast]++;
  turn++;
  if (n > 5 && !memcmp(p, "spin ", 5))
    sink = spin(strtoull(p + 5, 0, 10));
  else
    for (char *end = p + n; p < end && (p = memchr(p, '\n', end - p)); p++)
      count++;
  int len = snprintf(out, sizeof out, "{\"n\":\"count\",\"v\":%llu}\n", count);
  return (uint64_t)(uintptr_t)out << 32 | (uint32_t)len;
}
