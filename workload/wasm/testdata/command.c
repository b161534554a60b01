// A command in C.
#include <stdio.h>

int main(void) {
  char line[256];
  while (fgets(line, sizeof line, stdin)) printf("%s%.3f\n", line, 1.5);
}
