// A reactor in C with state in memory and in a WebAssembly global of its own.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

__asm__(".globaltype calls, i64\n"
        ".section .data.calls,\"\",@\n"
        "calls:\n");

static uint64_t count(void) {
  uint64_t n;
  __asm__ volatile("global.get calls\n"
                   "i64.const 1\n"
                   "i64.add\n"
                   "global.set calls\n"
                   "global.get calls\n"
                   "local.set %0\n"
                   : "=r"(n));
  return n;
}

static uint64_t sum;

__attribute__((export_name("edgekeep_alloc"))) void *edgekeep_alloc(uint32_t n) {
  return malloc(n);
}

__attribute__((export_name("edgekeep_batch"))) uint64_t edgekeep_batch(uint8_t *p, uint32_t n) {
  volatile uint8_t copy[256];
  for (uint32_t i = 0; i < n && i < sizeof copy; i++) copy[i] = p[i];
  for (uint32_t i = 0; i < n && i < sizeof copy; i++) sum = sum * 31 + copy[i];
  free(p);
  return sum ^ count() << 32;
}

__attribute__((export_name("edgekeep_reseed"))) void edgekeep_reseed(void) {}
