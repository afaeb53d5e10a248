// Rows of a matrix in tiles as floats: scale * code + low rounds twice.
#include "tiles.cuh"

// Variants: TYPE = Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4 F32 F16
//   BF16

template <class T>
EI_DEV float value_of(
    const uint8_t* w, const Layout<T>& at, const Head<T>& head, int number, int block, int i) {
    const int column = threadIdx.x;
    const int j = column / 4;
    const size_t unit = (size_t)(number / TILE) * at.n_blocks + block;
    const unsigned* lows = (const unsigned*)w;
    const unsigned low = lows[word_at<T::LOW_BITS>(unit, number % TILE, j % T::LOW_BITS)];
    unsigned high = 0;
    if constexpr (T::HIGH_BITS > 0) {
        const unsigned* highs = (const unsigned*)(w + at.high);
        high = highs[word_at<T::HIGH_BITS>(unit, number % TILE, j % T::HIGH_BITS)];
    }
    const unsigned word = code_word<T>(low, high, j);
    const int code = (int8_t)(word >> (8 * (column & 3))) - T::ZERO;
    float scale = T::scale(head, i);
    if constexpr (T::HAS_PARTS) {
        scale = scale * ei_to_float(column < 16 ? T::part(head, 2 * i) : T::part(head, 2 * i + 1));
    }
    float value = scale * ei_to_float(code);
    if constexpr (T::HAS_MINS) {
        const int min = column < 16 ? T::min(head, 2 * i) : T::min(head, 2 * i + 1);
        value = value + T::low(head, i) * ei_to_float(min);
    } else if constexpr (T::HAS_LOW) {
        value = value + T::low(head, i);
    }
    return value;
}

// Columns 256 * blockIdx.x and following of row `number`.
template <class T>
EI_DEV void embed_columns(const uint8_t* w, float* y, int number, int n, int k) {
    if constexpr (IS_FLOAT<T>) {
        const int n_units = (k + UNIT<T> - 1) / UNIT<T>;
        for (int i = 0; i < 8; ++i) {
            const int column = 256 * blockIdx.x + 32 * i + threadIdx.x;
            if (column < k) {
                const size_t unit = (size_t)(number / 8) * n_units + column / UNIT<T>;
                const size_t lane = 32 * unit + number % 8 * 4 + column % 4;
                y[column] = T::load(w + 16 * lane + column % UNIT<T> / 4 * T::BYTES);
            }
        }
    } else {
        const Layout<T> at = layout_of<T>(n, k);
        const int chunk = blockIdx.x;
        const Head<T> head = load_head(w, at, number / TILE, chunk, number % TILE);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            const int block = CHUNK * chunk + i;
            if (block < at.n_blocks) {
                y[BLOCK * block + threadIdx.x] = value_of(w, at, head, number, block, i);
            }
        }
    }
}

// Grid: (k / 256 rounded up, rows). w is (n, k) tiles.
EI_KERNEL(32) embed(const Step* step, const int* ids, const uint8_t* w, float* y, int n, int k) {
    const int row = blockIdx.y;
    if (ei_aborted(step) || row >= step->n_rows) {
        return;
    }
    embed_columns<TYPE>(w, y + (size_t)row * row_stride(k), ids[row], n, k);
}
