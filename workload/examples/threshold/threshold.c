// threshold is a workload of the shape "filter": a WASI command that is started
// for every batch. It reads readings as JSON lines and writes a reading
// alarm/NAME, true or false, when the alarm of a series goes on or off. The
// series whose alarm is on are the lines of the file "state".
//
//	threshold [--above X] [--below Y] [--hysteresis H]
//
// The alarm goes on above X or below Y, and off when the value is again at most
// X-H and at least Y+H. Exit status 2 says that an argument or a line is wrong.
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	MAX_LINE = 2048,  // bytes of a reading, without its newline
	MAX_NAME = 256,   // bytes of a series' name
	MAX_NUMBER = 40,  // characters of a number
	MAX_ON = 256,     // series whose alarm is on at the same time
};

static double above = INFINITY, below = -INFINITY, hysteresis = 0;

static _Noreturn void fail(const char *format, ...) {
	va_list args;
	va_start(args, format);
	fputs("threshold: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	exit(2);
}

// --- the alarms that are on -------------------------------------------------

static char on[MAX_ON][MAX_NAME + 1];
static int on_count;
static bool on_changed;

static int find(const char *name) {
	for (int i = 0; i < on_count; i++)
		if (strcmp(on[i], name) == 0)
			return i;
	return -1;
}

static void set(const char *name) {
	if (on_count == MAX_ON)
		fail("%d alarms are on, no room for %s: give the workload fewer streams", MAX_ON, name);
	strcpy(on[on_count++], name);
	on_changed = true;
}

static void clear(int i) {
	if (i != --on_count)
		strcpy(on[i], on[on_count]);
	on_changed = true;
}

// is_name: a name of SenML (RFC 8428, section 4.5.1), which is written as it is.
static bool is_name(const char *s) {
	size_t n = strlen(s);
	static const char chars[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-:./_";
	return n > 0 && n <= MAX_NAME && strspn(s, chars) == n && strchr("-:./_", s[0]) == NULL;
}

static void load(void) {
	FILE *f = fopen("state", "r");
	if (f == NULL) {
		if (errno == ENOENT)
			return; // the first batch
		fail("open state: %s", strerror(errno));
	}
	char line[MAX_NAME + 2];
	while (fgets(line, sizeof line, f) != NULL) {
		size_t n = strlen(line);
		if (n == 0 || line[n - 1] != '\n')
			fail("read state: line %d is cut short", on_count + 1);
		line[n - 1] = 0;
		if (!is_name(line) || find(line) >= 0)
			fail("read state: line %d is no name", on_count + 1);
		set(line);
	}
	if (ferror(f))
		fail("read state: %s", strerror(errno));
	fclose(f);
	on_changed = false;
}

// save writes a new file beside the old one and renames it, so that there is
// always a whole one.
static void save(void) {
	FILE *f = fopen("state.new", "w");
	if (f == NULL)
		fail("write state: %s", strerror(errno));
	for (int i = 0; i < on_count; i++)
		fprintf(f, "%s\n", on[i]);
	if (ferror(f) || fflush(f) != 0 || fsync(fileno(f)) != 0 || fclose(f) != 0 || rename("state.new", "state") != 0)
		fail("write state: %s", strerror(errno));
}

// --- reading a line ---------------------------------------------------------

struct reading {
	char name[MAX_NAME + 1];
	char time[MAX_NUMBER + 1]; // as it was written
	bool has_number;           // otherwise a string or a boolean
	double value;
};

static long line_number;
static const char *p; // in the line, which ends with a zero byte

static _Noreturn void bad(const char *why) { fail("line %ld of the batch: %s", line_number, why); }

static void space(void) { p += strspn(p, " \t\r"); }

static void expect(char c) {
	space();
	if (*p++ != c)
		bad("not a JSON object of one reading");
}

static int digits(void) {
	int n = 0;
	while (*p >= '0' && *p <= '9')
		p++, n++;
	return n;
}

// number takes a number of JSON's grammar and keeps its text.
static double number(char text[MAX_NUMBER + 1]) {
	space();
	const char *start = p;
	if (*p == '-')
		p++;
	const char *first = p;
	int n = digits();
	if (n == 0 || (n > 1 && *first == '0'))
		bad("not a number");
	if (*p == '.' && (p++, digits() == 0))
		bad("not a number");
	if (*p == 'e' || *p == 'E') {
		p++;
		if (*p == '+' || *p == '-')
			p++;
		if (digits() == 0)
			bad("not a number");
	}
	size_t length = (size_t)(p - start);
	if (length > MAX_NUMBER)
		bad("a number is too long");
	memcpy(text, start, length);
	text[length] = 0;
	double v = strtod(text, NULL);
	if (!isfinite(v))
		bad("a number is out of range");
	return v;
}

// string takes a string and keeps it, or, with no place for it, only checks it.
// What is kept may hold no escapes: neither keys nor names need them.
static void string(char *to, size_t size) {
	expect('"');
	size_t n = 0;
	for (; *p != '"'; p++) {
		if ((unsigned char)*p < 0x20)
			bad("a string does not end");
		if (to != NULL) {
			if (*p == '\\' || n + 1 >= size)
				bad("a key or name is too long or has an escape");
			to[n++] = *p;
		} else if (*p == '\\') {
			p++;
			if (*p == 'u' && strspn(p + 1, "0123456789abcdefABCDEF") >= 4)
				p += 4;
			else if (*p == 0 || strchr("\"\\/bfnrt", *p) == NULL)
				bad("an unknown escape");
		}
	}
	p++;
	if (to != NULL)
		to[n] = 0;
}

static void boolean(void) {
	space();
	size_t n = strncmp(p, "true", 4) == 0 ? 4 : strncmp(p, "false", 5) == 0 ? 5 : 0;
	if (n == 0)
		bad("vb is neither true nor false");
	p += n;
}

static void parse(const char *line, struct reading *r) {
	enum { N = 1, T = 2, U = 4, V = 8 } key;
	unsigned seen = 0;
	p = line;
	expect('{');
	do {
		char name[4], text[MAX_NUMBER + 1];
		string(name, sizeof name);
		expect(':');
		if (strcmp(name, "n") == 0) {
			key = N;
			string(r->name, sizeof r->name);
		} else if (strcmp(name, "t") == 0) {
			key = T;
			number(r->time);
		} else if (strcmp(name, "u") == 0) {
			key = U;
			string(NULL, 0);
		} else if (strcmp(name, "v") == 0) {
			key = V;
			r->value = number(text);
			r->has_number = true;
		} else if (strcmp(name, "vs") == 0) {
			key = V;
			string(NULL, 0);
		} else if (strcmp(name, "vb") == 0) {
			key = V;
			boolean();
		} else {
			bad("an unknown key");
		}
		if (seen & key)
			bad("two of a key, or two values");
		seen |= key;
		space();
	} while (*p == ',' && p++);
	expect('}');
	space();
	if (*p != 0)
		bad("something follows the reading");
	if ((seen & (N | T | V)) != (N | T | V))
		bad("n, t, or a value is missing");
	if (!is_name(r->name))
		bad("n is no name");
}

// next_line reads a line of the batch without its newline; false at the end.
static bool next_line(char line[MAX_LINE + 1]) {
	int n = 0, c;
	line_number++;
	while ((c = getchar()) != EOF && c != '\n') {
		if (c == 0 || n == MAX_LINE)
			bad(c == 0 ? "a zero byte" : "the line is too long");
		line[n++] = (char)c;
	}
	if (ferror(stdin))
		fail("read the batch: %s", strerror(errno));
	line[n] = 0;
	return c != EOF || n > 0;
}

// --- the workload -----------------------------------------------------------

static void judge(const struct reading *r) {
	int i = find(r->name);
	if (i < 0 && (r->value > above || r->value < below)) {
		set(r->name);
		printf("{\"n\":\"alarm/%s\",\"t\":%s,\"vb\":true}\n", r->name, r->time);
	} else if (i >= 0 && r->value <= above - hysteresis && r->value >= below + hysteresis) {
		clear(i);
		printf("{\"n\":\"alarm/%s\",\"t\":%s,\"vb\":false}\n", r->name, r->time);
	}
}

static void arguments(int argc, char **argv) {
	for (int i = 1; i < argc; i += 2) {
		double *to = strcmp(argv[i], "--above") == 0      ? &above
		             : strcmp(argv[i], "--below") == 0    ? &below
		             : strcmp(argv[i], "--hysteresis") == 0 ? &hysteresis
		                                                  : NULL;
		char *end;
		if (to == NULL || i + 1 == argc)
			fail("arguments are [--above X] [--below Y] [--hysteresis H]");
		*to = strtod(argv[i + 1], &end);
		if (end == argv[i + 1] || *end != 0 || !isfinite(*to))
			fail("%s: %s is no number", argv[i], argv[i + 1]);
	}
	if (!isfinite(above) && !isfinite(below))
		fail("give --above or --below");
	if (hysteresis < 0 || !(below + hysteresis <= above - hysteresis))
		fail("no value would end the alarm: lower --hysteresis");
}

int main(int argc, char **argv) {
	static char line[MAX_LINE + 1];
	arguments(argc, argv);
	load();
	while (next_line(line)) {
		struct reading r = {0};
		parse(line, &r);
		if (r.has_number)
			judge(&r);
	}
	// A batch counts when the status is 0, its state and output together.
	if (on_changed)
		save();
	if (fflush(stdout) != 0 || ferror(stdout))
		fail("write the output: %s", strerror(errno));
	return 0;
}
