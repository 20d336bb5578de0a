// A program: what a folded network does, as a flat list of steps over memory that was laid out beforehand.
//
// Every step is a row of kStepWidth 64-bit words, written by fastens/program/steps.py in the order of the structs
// below. All values are float32; only a pointwise step reads and writes other dtypes. Activations are channels-last.
#pragma once

#include <bit>
#include <cstdint>

#include "isa/inline.h"

namespace fastens::program {

constexpr int64_t kStepWidth = 96;
constexpr int kLanes = 16;  // output channels of one vector of packed weights

enum class Kind : int64_t { kConv = 1, kNorm, kPointwise, kLayerNorm, kAttention, kWinograd, kDraw, kDrop, kGather };
constexpr int64_t kKinds = 10;
enum class Activation : int64_t { kNone, kSilu, kGelu, kGeluTanh };

// Where a value is: slot << 48 | bytes from its start; negative for none. Slot 0 is the arena, 1 the packed weights,
// then the inputs and the outputs of the call.
using Address = int64_t;

struct Slots {
  char* const* bases;
  template <class T = float>
  FASTENS_INLINE T* at(Address address) const {
    if (address < 0) return nullptr;
    return reinterpret_cast<T*>(bases[address >> 48] + (address & ((int64_t{1} << 48) - 1)));
  }
};

// Channels of R images, in units of elements; the channels of a pixel are contiguous.
struct Image {
  Address at;
  int64_t row, y, x, channels;
  int64_t rows;  // the image of row r is r % rows: one copy serves all members
};

struct Header {
  int64_t kind, tasks;
};

// Which member's parameters a row takes: rows come in runs of `rows_per_member`, of member 0, 1, ... in turn, or of the
// members that an int64 array gives, one for each run.
FASTENS_INLINE int64_t member_of(const Slots& slots, Address members, int64_t rows_per_member, int64_t row) {
  const int64_t run = row / rows_per_member;
  const int64_t* const given = slots.at<const int64_t>(members);
  return given ? given[run] : run;
}

// The first run of another member after run `begin`, by bisection: given members come in order. Where they do not, it
// is some run after `begin`.
FASTENS_INLINE int64_t end_of_member(const Slots& slots, Address members, int64_t begin, int64_t runs) {
  const int64_t* const given = slots.at<const int64_t>(members);
  int64_t low = begin + 1, high = given ? runs : low;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (given[middle] > given[begin]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// A dropout mask, one bit for each channel of a pixel, 16 channels to a word: x * (bit ? scale : 0). Rows take a mask
// each, or the runs of `rows` rows that of their member.
struct Mask {
  Address at;
  int64_t row, pixel;  // words from a mask, and from a pixel, to the next
  int64_t rows;
  Address members;  // see member_of
  double scale;
};

// A convolution, or a linear layer as one of 1x1 over tokens:
// out = act_out(((conv(act_in(x * table_scale + table_shift) * mask_in) + bias + row_vector) * mask_out + residual) *
//               scale / divisor).
struct Conv {
  Header header;
  int64_t rows, rows_per_member;
  int64_t row_chunk, band, block_chunk;  // a task: rows of one member, lines of the output, blocks of channels
  int64_t vectors;                       // of one block of output channels
  Image source[2];                       // joined along the channels; the second may be absent (0 channels)
  int64_t up;                            // nearest-neighbour enlargement of the source
  int64_t in_h, in_w;                    // after it
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;
  int64_t out_h, out_w, out_channels;
  Address table_scale, table_shift;  // [R, C_in]
  int64_t act_in;
  Address weight;  // [K][block][tap][C_in][vectors * 16]; of kWinograd, the transformed taps, (tile + 2)^2 of them
  int64_t weight_member;
  Address bias;  // [K, C_out padded to vectors]
  int64_t bias_member;
  Address row_vector;  // [R, C_out]
  int64_t row_vector_row;
  Image residual;
  double scale;
  int64_t act_out;
  Image out;
  int64_t bfloat16;  // products of bfloat16 values, summed in float32
  Address members;   // see member_of, as below
  Mask mask_in, mask_out;
  double divisor;
  int64_t tile;  // of a step of kind kWinograd: the output is computed in squares of so many pixels a side
};

// Group normalisation as a scale and a shift per row and channel: y = x * out_scale + out_shift.
struct Norm {
  Header header;
  int64_t rows, rows_per_member, splits;
  Image source[2];
  int64_t height, width, groups;
  Address weight, bias;  // [K, C]
  Address row_scale;     // [R, C]: y (1 + row_scale) + row_shift
  int64_t row_scale_row;
  Address row_shift;
  int64_t row_shift_row;
  double eps;
  Address out_scale, out_shift;  // [R, C]
  Address members;
};

constexpr int kMaxDims = 6, kMaxInputs = 4, kMaxInstructions = 8;

struct Strided {
  Address at;
  int64_t dtype;  // 0 float32, 1 float64, 2 int64, 3 int32, 4 bfloat16
  int64_t strides[kMaxDims];
};

// out = a chain of instructions on registers: the inputs are registers 0.., each instruction writes the next one.
struct Pointwise {
  Header header;
  int64_t sizes[kMaxDims];
  Strided out;
  int64_t num_inputs;
  Strided inputs[kMaxInputs];
  int64_t num_instructions;
  struct {
    int64_t code;  // opcode | a << 16 | b << 32
    double immediate;
  } instructions[kMaxInstructions];
};

// Layer normalisation of the last dimension of [R, tokens, C], scale and shift by member, then by row.
struct LayerNorm {
  Header header;
  int64_t rows, rows_per_member, tokens, channels;
  Address source;
  int64_t source_row, source_token;
  Address weight, bias;  // [K, C]
  Address row_scale;     // [R, C]
  int64_t row_scale_row;
  Address row_shift;
  int64_t row_shift_row;
  double eps;
  Address out;
  int64_t out_row, out_token;
  Address members;
};

struct Heads {
  Address at;
  int64_t row, head, token, channel;
};

// softmax(scale q k^T) v
struct Attention {
  Header header;
  int64_t rows, heads, queries, keys, width, value_width, query_chunk;
  Heads q, k, v, out;
  double scale;
};

// A fresh dropout mask for each row: element pixel * pixel_step + channel * channel_step of a row is kept where its
// word of Philox4x32-10 is at least the threshold, as in csrc/cpu/dropout.cpp.
struct Draw {
  Header header;
  int64_t rows, rows_per_member, splits;  // a task: a share of the pixels of one row
  int64_t pixels, channels, pixel_step, channel_step;
  Address key, evaluation;  // int64
  Address samples;          // int64 [R]
  int64_t threshold;        // above 0
  Address out;              // a Mask's words
  int64_t out_row, out_pixel;
  Address members;
};

// out = act(x * table_scale + table_shift) * mask, of a value that nothing computes on its way in or out.
struct Drop {
  Header header;
  int64_t rows, splits;  // a task: a share of the lines of one row
  Image source[2];
  int64_t height, width;
  Address table_scale, table_shift;
  int64_t activation;
  Mask mask;
  Image out;
};

// For each row, its member's line of a table.
struct Gather {
  Header header;
  int64_t rows, count;  // float32 values of a line
  Address table;        // [K, count]
  Address members;      // int64 [R]
  Address out;          // [R, count]
};

template <class T>
FASTENS_INLINE const T& as(const int64_t* words) {
  static_assert(sizeof(T) <= kStepWidth * sizeof(int64_t));
  return *reinterpret_cast<const T*>(words);
}

}  // namespace fastens::program
