"""The forward of few tokens on a CPU, in C: compiled where it runs, by the compiler that is there."""
