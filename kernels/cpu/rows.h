/* What is asked of one row of numbers in more than one place. */
#ifndef DRAFTSMITH_ROWS_H
#define DRAFTSMITH_ROWS_H

#include <stdint.h>

/* Place of the first NaN if there is one, else of the first of the largest. */
int64_t place_of_largest(const float *x, int64_t width);

/* log Σ e^x, counted from the largest. */
float log_sum(const float *x, int64_t width, float largest);

#endif
