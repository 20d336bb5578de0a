// bfloat16 and half, as bits, from and to float: to the bit what torch's own types do, without torch's headers.
#pragma once

#include <bit>
#include <cstdint>

#include "isa/inline.h"

namespace fastens {

FASTENS_INLINE float float_of_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Rounded to nearest even; every NaN becomes one.
FASTENS_INLINE uint16_t bfloat16_of(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
}

// The exponent is moved by a product with a power of two, which keeps infinities and NaN; what is subnormal in half is
// made by a difference of floats that have its bits in their lowest.
FASTENS_INLINE float float_of_half(uint16_t half) {
  const uint32_t top = static_cast<uint32_t>(half) << 16, twice = top + top;
  const float normal = std::bit_cast<float>((twice >> 4) + (uint32_t{0xE0} << 23)) * 0x1p-112f;
  const float subnormal = std::bit_cast<float>((twice >> 17) | (uint32_t{126} << 23)) - 0.5f;
  const uint32_t size = std::bit_cast<uint32_t>(twice < uint32_t{1} << 27 ? subnormal : normal);
  return std::bit_cast<float>((top & 0x80000000u) | size);
}

// Rounded to nearest even by an addition to a number whose last bit is half's; every NaN becomes one but for its sign.
FASTENS_INLINE uint16_t half_of(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), twice = bits + bits;
  const float size = (std::bit_cast<float>(bits & 0x7FFFFFFFu) * 0x1p+112f) * 0x1p-110f;  // infinite where half is
  const uint32_t exponent = twice & 0xFF000000u, least = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = std::bit_cast<uint32_t>(std::bit_cast<float>((least >> 1) + 0x07800000u) + size);
  const uint32_t rounded = (sum >> 13 & 0x7C00u) + (sum & 0x0FFFu);
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | (twice > 0xFF000000u ? 0x7E00u : rounded));
}

}  // namespace fastens
