// Made by `python -m fastens.program.layout` of fastens/program/steps.py: change that, and make it again.
#pragma once

#include <cstdint>

// clang-format off
namespace fastens::program {

constexpr int64_t kStepWidth = 96;  // 64-bit words of a step
constexpr int kLanes = 16;  // output channels of one vector of packed weights
constexpr int kMaxDims = 6;
constexpr int kMaxInputs = 4;
constexpr int kMaxInstructions = 8;
constexpr int64_t kPatchBytes = 262144;  // input of one task of a convolution: a share of the second-level cache
constexpr int64_t kTasksPerThread = 3;
constexpr int64_t kKinds = 10;

// What a step is.
enum class Kind : int64_t {
  kConv = 1,
  kNorm = 2,
  kPointwise = 3,
  kLayerNorm = 4,
  kAttention = 5,
  kWinograd = 6,
  kDraw = 7,
  kDrop = 8,
  kGather = 9,
};

// What is applied to a value on its way into or out of a step.
enum class Activation : int64_t {
  kNone = 0,
  kSilu = 1,
  kGelu = 2,
  kGeluTanh = 3,
};

constexpr const char* kActivationNames[] = {"none", "silu", "gelu", "gelu_tanh"};

// An elementwise instruction; the names of two-operand ones end in their operands' order.
enum class Opcode : int64_t {
  kCopy = 0,
  kAdd = 1,
  kSubtract = 2,
  kMultiply = 3,
  kDivide = 4,
  kAddNumber = 5,
  kMultiplyNumber = 6,
  kNumberMinus = 7,
  kNumberOver = 8,
  kSilu = 9,
  kGelu = 10,
  kGeluTanh = 11,
  kSigmoid = 12,
  kTanh = 13,
  kExp = 14,
  kLog = 15,
  kSin = 16,
  kCos = 17,
  kSqrt = 18,
  kSquare = 19,
  kRelu = 20,
  kAbs = 21,
  kDivideNumber = 22,
};

// What a value of a pointwise step is in memory.
enum class Dtype : int64_t {
  kFloat32 = 0,
  kFloat64 = 1,
  kInt64 = 2,
  kInt32 = 3,
  kBfloat16 = 4,
};

constexpr int64_t kSizes[] = {4, 8, 8, 4, 2};  // bytes of each Dtype

// slot << 48 | bytes from its start; negative for what is absent.
using Address = int64_t;

struct Header {
  int64_t kind, tasks;
};

struct Instruction {
  int64_t code;  // opcode | a << 16 | b << 32
  double immediate;
};

// Channels of the rows' images: element strides between rows, lines and pixels.
struct Image {
  Address at;
  int64_t row;
  int64_t y;
  int64_t x;
  int64_t channels;
  int64_t rows;  // the image of row r is r % rows
};

// A value of any dtype and up to six dimensions.
struct Strided {
  Address at;
  int64_t dtype;  // of DTYPES
  int64_t strides[kMaxDims];
};

// A dropout mask: a bit for each channel of a pixel, 16 channels to a word; strides in words.
struct Mask {
  Address at;
  int64_t row;  // from a mask to the next
  int64_t pixel;  // from a pixel to the next
  int64_t rows;  // rows that have one mask, that of their member
  Address members;  // of the runs of rows
  double scale;  // of what is kept
};

// Tokens of the heads of the rows: element strides.
struct Heads {
  Address at;
  int64_t row;
  int64_t head;
  int64_t token;
  int64_t channel;
};

// A convolution, or a linear layer as one of 1x1 over tokens.
//
// out = act_out(((conv(act_in(x * table_scale + table_shift) * mask_in) + bias + row_vector) * mask_out + residual) *
// scale / divisor).
struct Conv {
  Header header;
  int64_t rows;
  int64_t rows_per_member;
  int64_t row_chunk;  // of a task: rows of one member
  int64_t band;  // lines of the output
  int64_t block_chunk;  // blocks of channels
  int64_t vectors;  // of one block of output channels
  Image sources[2];  // joined along the channels; the second may be absent (0 channels)
  int64_t up;  // nearest-neighbour enlargement of the sources
  int64_t in_h;  // after it
  int64_t in_w;
  int64_t kernel_h;
  int64_t kernel_w;
  int64_t stride_h;
  int64_t stride_w;
  int64_t pad_top;
  int64_t pad_left;
  int64_t out_h;
  int64_t out_w;
  int64_t out_channels;
  Address table_scale;  // [R, C_in]
  Address table_shift;
  int64_t act_in;
  Address weight;  // [K][block][tap][C_in][vectors * 16]; of Winograd, the transformed taps, (tile + 2)^2 of them
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
  Address members;
  Mask mask_in;
  Mask mask_out;
  double divisor;  // of what is multiplied by `scale`
};

// Group normalisation as a scale and a shift per row and channel: y = x * out_scale + out_shift.
struct Norm {
  Header header;
  int64_t rows;
  int64_t rows_per_member;
  int64_t splits;
  Image sources[2];
  int64_t height;
  int64_t width;
  int64_t groups;
  Address weight;  // [K, C]
  Address bias;
  Address row_scale;  // [R, C]: y (1 + row_scale) + row_shift
  int64_t row_scale_row;
  Address row_shift;
  int64_t row_shift_row;
  double eps;
  Address out_scale;  // [R, C]
  Address out_shift;
  Address members;
};

// A chain of instructions on registers: the inputs come first, each instruction writes the next one.
struct Pointwise {
  Header header;
  int64_t sizes[kMaxDims];
  Strided out;
  int64_t num_inputs;
  Strided inputs[kMaxInputs];
  int64_t num_instructions;
  Instruction instructions[kMaxInstructions];  // opcode | a << 16 | b << 32, number; in turn
};

// Layer normalisation of the last dimension, scale and shift by member, then by row.
struct LayerNorm {
  Header header;
  int64_t rows;
  int64_t rows_per_member;
  int64_t tokens;
  int64_t channels;
  Address source;
  int64_t source_row;
  int64_t source_token;
  Address weight;  // [K, C]
  Address bias;
  Address row_scale;  // [R, C]: y (1 + row_scale) + row_shift
  int64_t row_scale_row;
  Address row_shift;
  int64_t row_shift_row;
  double eps;
  Address out;
  int64_t out_row;
  int64_t out_token;
  Address members;
};

// softmax(scale q k^T) v, for every row and head.
struct Attention {
  Header header;
  int64_t rows;
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t width;
  int64_t value_width;
  int64_t query_chunk;
  Heads q;
  Heads k;
  Heads v;
  Heads out;
  double scale;
};

// A fresh dropout mask for each row, element ``pixel * pixel_step + channel * channel_step`` of it by Philox.
struct Draw {
  Header header;
  int64_t rows;
  int64_t rows_per_member;
  int64_t splits;  // a task: a share of the pixels of one row
  int64_t pixels;
  int64_t channels;
  int64_t pixel_step;
  int64_t channel_step;
  Address key;  // int64, as are the next two
  Address evaluation;
  Address samples;  // [R]
  int64_t threshold;  // above 0
  Address out;  // a Mask's words
  int64_t out_row;
  int64_t out_pixel;
  Address members;
};

// Normalisation, activation and dropout, of a value that no other step computes on its way in or out.
struct Drop {
  Header header;
  int64_t rows;
  int64_t splits;  // a task: a share of the lines of one row
  Image sources[2];
  int64_t height;
  int64_t width;
  Address table_scale;
  Address table_shift;
  int64_t activation;
  Mask mask;
  Image out;
};

// Copies to each row the line of a table [K, count] that is its member's.
struct Gather {
  Header header;
  int64_t rows;
  int64_t count;  // float32 values of a line
  Address table;  // [K, count]
  Address members;  // int64 [R]
  Address out;  // [R, count]
};

// A 3x3 convolution of stride 1 in squares of the output, its weights transformed for them.
struct Winograd : Conv {
  int64_t tile;  // pixels on a side of a square, 2 or 4
};

}  // namespace fastens::program
