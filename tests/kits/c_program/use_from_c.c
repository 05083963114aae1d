/* The C interface as a C program sees it: arguments BUNDLE and what to do. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mmd_bundle.h"

int main(int count, char **words) {
  mmd_sampler *sampler = NULL;
  mmd_self_test_result result;
  float image[64];
  int64_t shape[3];
  int dtype = -1;
  int status;
  if (count != 3) return 99;
  status = mmd_open(words[1], 1, &sampler);
  if (status == MMD_OK) status = mmd_image(sampler, shape, &dtype);
  if (status == MMD_OK) status = mmd_self_test(sampler, 1, &result);
  if (status == MMD_OK && strcmp(words[2], "small") == 0)
    status = mmd_sample(sampler, 7, 0, 1, NULL, image, sizeof image - 1);
  if (status == MMD_OK && strcmp(words[2], "null") == 0)
    status = mmd_sample(sampler, 7, 0, 1, NULL, NULL, sizeof image);
  if (status == MMD_OK && strcmp(words[2], "labels") == 0) {
    const int64_t label = 3;
    status = mmd_sample(sampler, 7, 0, 1, &label, image, sizeof image);
  }
  if (status == MMD_OK) status = mmd_sample(sampler, 7, 0, 1, NULL, image, sizeof image);
  if (status == MMD_OK)
    printf("%d x %d x %d of type %d, %d images, first value %.9g\n", (int)shape[0], (int)shape[1], (int)shape[2], dtype,
           (int)result.images, image[0]);
  else fprintf(stderr, "%s\n", mmd_last_error());
  if (strcmp(words[2], "leak") != 0) mmd_close(sampler);
  return status;
}
