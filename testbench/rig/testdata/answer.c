// A reactor for requests. What it is sent it answers:
//
//   TEXT    with TEXT backwards
//   {...}   JSON lines: it adds up their "v" and answers with how many it has seen
//           by now and their sum, as readings
//   ?TEXT   with nothing: it remembers TEXT, with the lowest bit of each letter flipped
//   !trap   not at all, after it has counted a million more
//   !loop   not at all, and it takes all the time there is
//   !huge   with more than fits a result
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned long long count, sum;
static char in[1 << 17], out[1 << 17], kept[256];

__attribute__((export_name("edgekeep_alloc"))) void *edgekeep_alloc(uint32_t n) { return n <= sizeof in - 1 ? in : NULL; }

static uint64_t answer(size_t n) { return (uint64_t)(uintptr_t)out << 32 | (uint32_t)n; }

__attribute__((export_name("edgekeep_batch"))) uint64_t edgekeep_batch(char *p, uint32_t n) {
  p[n] = 0;
  if (*p == '!') {
    count += 1000000;
    if (!strcmp(p, "!trap"))
      __builtin_trap();
    if (!strcmp(p, "!huge"))
      return answer((64 << 10) + 1);
    while (!strcmp(p, "!loop"))
      __asm__ volatile("");
  }
  if (*p == '?') {
    for (uint32_t i = 1; i < n && i < sizeof kept; i++)
      kept[i] = p[i] ^ 1;
    return answer(0);
  }
  if (*p != '{' && n > 0) {
    for (uint32_t i = 0; i < n; i++)
      out[i] = p[n - 1 - i];
    return answer(n);
  }
  for (char *v = p; (v = strstr(v, "\"v\":")); count++)
    sum += strtoull(v += 4, 0, 10);
  return answer(snprintf(out, sizeof out, "{\"n\":\"count\",\"v\":%llu}\n{\"n\":\"sum\",\"v\":%llu}\n", count, sum));
}
