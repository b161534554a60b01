// probe is a guest for tests: a reactor, or with FILTER a command, that does what
// the first letter of its batch says.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static char in[(1 << 20) + 1], out[1 << 20];
static int batches, reseeds, file = -1;
static long long newest;
static char *grown[1024];
static int grown_count;

static volatile int sink;
static int deep(int n) {
	volatile char frame[256];
	frame[n & 255] = n;
	sink = frame[0];
	return n == 0 ? 0 : deep(n - 1) + frame[n & 255] * 0;
}

static int fail(const char *why) {
	fputs("probe: ", stderr);
	fprintf(stderr, "%s", why);
	fputc('\n', stderr);
	return -1;
}

// state writes all that a snapshot has to bring along: counters, a file that is
// open since the first batch, a clock that never goes back.
static int state(void) {
	if (file < 0 && (file = open("journal", O_CREAT | O_RDWR | O_EXCL, 0600)) < 0)
		return fail("open");
	if (batches == 1 && unlink("journal") != 0)
		return fail("unlink");
	dprintf(file, "%d\n", batches);
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	long long ns = now.tv_sec * 1000000000LL + now.tv_nsec;
	int back = ns < newest;
	newest = ns;
	batches++;
	return sprintf(out, "batch %d, %lld bytes, reseeds %d, back %d, grown %d", batches, (long long)lseek(file, 0, SEEK_END), reseeds, back, grown_count);
}

static int run(int n) {
	in[n] = 0;
	long arg = n > 1 ? strtol(in + 1, NULL, 10) : 0;
	switch (n > 0 ? in[0] : 0) {
	case 0: return 0;
	case 'e': memcpy(out, in, n); return n;
	case 's': return state();
	case 'f': return fail("as asked");
	case 't': __builtin_trap();
	case 'x': exit((int)arg);
	case 'k': return deep(100000000);
	case 'o': memset(out, 'o', arg); return (int)arg;
	case 'w': for (long i = 0; i < arg; i++) fprintf(stderr, "line %ld\n", i); return 0;
	case 'b': for (;;) sink++;
	case 'n': { struct timespec t = {arg, 0}; nanosleep(&t, NULL); return 0; }
	case 'm':
		for (long i = 0; i < arg; i++) {
			char *p = malloc(1 << 16);
			if (p == NULL) return fail("out of memory");
			memset(p, grown_count + 1, 1 << 16);
			grown[grown_count++ % 1024] = p;
		}
		return 0;
	case 'd': {
		FILE *f = fopen("big", "a");
		for (long i = 0; i < arg; i++) if (fputc('d', f) == EOF) return fail("disk full");
		if (fclose(f) != 0) return fail("disk full");
		return 0;
	}
	case 'g': { // touch pages of what was grown
		for (long i = 0; i < arg && i < grown_count; i++) grown[i][i & 0xffff]++;
		unsigned long sum = 0;
		for (int i = 0; i < grown_count; i++) for (int k = 0; k < 1 << 16; k += 97) sum = sum * 31 + (unsigned char)grown[i][k];
		return sprintf(out, "%lu", sum);
	}
	}
	return fail("what?");
}

#ifdef FILTER
int main(void) {
	int n = (int)fread(in, 1, sizeof in - 1, stdin);
	FILE *f = fopen("count", "r");
	if (f != NULL) { if (fscanf(f, "%d", &batches) != 1) return 9; fclose(f); }
	batches++;
	f = fopen("count", "w");
	fprintf(f, "%d", batches);
	fclose(f);
	if (in[0] == 'c') { printf("batch %d", batches); return 0; }
	if (in[0] == 's') in[0] = '?';
	n = run(n);
	if (n < 0) return 1;
	fwrite(out, 1, n, stdout);
	return 0;
}
#else
__attribute__((export_name("edgekeep_alloc"))) char *edgekeep_alloc(int n) { return n < (int)sizeof in ? in : NULL; }
__attribute__((export_name("edgekeep_reseed"))) void edgekeep_reseed(void) { reseeds++; }
__attribute__((export_name("edgekeep_batch"))) long long edgekeep_batch(char *p, int n) {
	if (n > 0 && p[0] == 'p') return (long long)0xfffffff0 << 32 | 0x100;
	if (n > 0 && p[0] == 'h') return (long long)0x7fffffff;
	int got = run(n);
	return got < 0 ? -1 : (long long)(unsigned long)out << 32 | (unsigned)got;
}
#endif
