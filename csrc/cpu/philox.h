// Philox4x32-10 (Salmon et al., SC 2011): which weights dropout keeps, 64 keys at a time.
#pragma once
#include <cstdint>

#include "fastattn/params.h"

namespace fastattn {
namespace FASTATTN_ISA {

struct Dropout {
    uint64_t seed, offset;
    uint64_t threshold;  // keep iff u32 >= threshold
    float factor;        // 1 / (1 - p), or 0 where nothing is kept

    explicit Dropout(const SoftmaxParams& p) : seed(p.seed), offset(p.offset) {
        const double t = p.dropout_p * 4294967296.0;
        threshold = static_cast<uint64_t>(t);
        if (static_cast<double>(threshold) < t) ++threshold;
        factor = p.dropout_p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout_p));
    }
};

// Bit j: key 64 * tile + j of query i is kept; head = b * Hq + h.
inline uint64_t keep_word(const Dropout& d, int64_t head, int64_t i, int64_t tile) {
    uint32_t c0[16], c1[16], c2[16], c3[16];
    for (int g = 0; g < 16; ++g) {
        c0[g] = static_cast<uint32_t>(tile * 16 + g);
        c1[g] = static_cast<uint32_t>(i);
        c2[g] = static_cast<uint32_t>(head);
        c3[g] = static_cast<uint32_t>(d.offset);
    }
    uint32_t k0 = static_cast<uint32_t>(d.seed), k1 = static_cast<uint32_t>(d.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int g = 0; g < 16; ++g) {
            const uint64_t x = uint64_t{0xD2511F53} * c0[g], y = uint64_t{0xCD9E8D57} * c2[g];
            const uint32_t n0 = static_cast<uint32_t>(y >> 32) ^ c1[g] ^ k0;
            const uint32_t n2 = static_cast<uint32_t>(x >> 32) ^ c3[g] ^ k1;
            c0[g] = n0;
            c1[g] = static_cast<uint32_t>(y);
            c2[g] = n2;
            c3[g] = static_cast<uint32_t>(x);
        }
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    uint64_t word = 0;
    for (int g = 0; g < 16; ++g) {
        const uint64_t kept =
            static_cast<uint64_t>(c0[g] >= d.threshold) | static_cast<uint64_t>(c1[g] >= d.threshold) << 1 |
            static_cast<uint64_t>(c2[g] >= d.threshold) << 2 | static_cast<uint64_t>(c3[g] >= d.threshold) << 3;
        word |= kept << (4 * g);
    }
    return word;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
