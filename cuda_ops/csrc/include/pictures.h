// include/pictures.h   Pictures made ready for the vision tower on the host. No CUDA twin: this is the api's
// work.

#pragma once

#include "../common/status.h"

namespace octet::cpu {

// pixels [rows, columns, 4] (red, green, blue, ignored) resized to [out_rows, out_columns] by Pillow's
// bicubic filter, bit for bit, and cut into patches [out_rows/14 * out_columns/14, 588]: windows of 2x2
// patches in raster order, a patch as (channel, y, x). out_rows and out_columns are multiples of 28.
Status resize_patches(const uint8_t* pixels, int64_t rows, int64_t columns, int64_t out_rows,
                      int64_t out_columns, uint8_t* patches);

}  // namespace octet::cpu
