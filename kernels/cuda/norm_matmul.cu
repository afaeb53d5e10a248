// Rows of floats, normed or as they are, times up to three matrices of blocks side by side:
// y = norm(x) W^T + bias, and to that of the first a residual may be added.
#include "matmul.cuh"
#include "norm.cuh"

// WARPS warps share a tile of 32 rows of a matrix, for ROWS rows of x. Matrices 0 and 1 are of
// TYPE, matrix 2 of LAST.
// Variants: TYPE = Q4_0; LAST = Q4_0; WARPS = 4 8; ROWS = 1
// Variants: TYPE = Q8_0; LAST = Q8_0; WARPS = 4 8; ROWS = 1
// Variants: TYPE = Q4_K; LAST = Q4_K Q5_K Q6_K; WARPS = 4 8; ROWS = 1
// Variants: TYPE = Q5_K; LAST = Q5_K Q6_K; WARPS = 4 8; ROWS = 1
// Variants: TYPE = Q6_K; LAST = Q6_K; WARPS = 4 8; ROWS = 1

template <class A, class B>
constexpr bool IS_SAME = false;
template <class A>
constexpr bool IS_SAME<A, A> = true;

// Blocks a processor should have, 0: as the compiler likes. Codes of 8 bits want more registers than
// it takes by itself, see matmul.cu; so do those of Q5_K on sm_70 and sm_72, where it spills.
template <class T>
constexpr int LEAST_BLOCKS = T::LOW_BITS == 8;
#if __CUDA_ARCH__ == 700 || __CUDA_ARCH__ == 720
template <>
constexpr int LEAST_BLOCKS<Q5_K> = 1;
#endif

// A matrix and the part that a block of threads has in it.
struct Part {
    const uint8_t* w;
    const float* bias;
    const float* residual;
    float* y;
    int n, block, n_blocks;
};

template <class T>
EI_DEV void multiply_part(const Part& part, const Normed<WARPS, ROWS>& x, uint8_t* left) {
    const X8 row = x8_row(x.x8, 0, x.k);
    const Factors<T> f = {part.w, nullptr, layout_of<T>(part.n, x.k), row, x.k, x.first, x.n_rows};
    const Output out = {part.y, part.residual, part.bias, nullptr, (size_t)row_stride(part.n)};
    const Stores stores = {out, part.n, x.first, x.n_rows};
    multiply<1>(f, (Left<T, WARPS, ROWS>*)left, part.block, part.n_blocks, x, stores);
}

// Grid: (blocks_0 + blocks_1 + those of matrix 2, rows / ROWS rounded up): a matrix has at least
// one block of threads and at most n / 32, or none where there is no such matrix. Its dynamic
// shared memory: tiles.py `normed_bytes`. `gather`, if any, names rows of x; norm is null where
// there is no weight or is_normed is 0. Biases and the residual, which may be y_0, may be null.
EI_KERNEL(32 * WARPS, LEAST_BLOCKS<TYPE>) norm_matmul(
    const Step* step, int rows, const int* gather, const float* x, const float* norm, float eps,
    int is_normed, const uint8_t* w_0, const uint8_t* w_1, const uint8_t* w_2, const float* bias_0,
    const float* bias_1, const float* bias_2, const float* residual, float* y_0, float* y_1,
    float* y_2, int n_0, int n_1, int n_2, int blocks_0, int blocks_1, int k) {
    const int n_rows = ei_rows(step, rows);
    const int first_row = blockIdx.y * ROWS;
    if (ei_aborted(step) || first_row >= n_rows) {
        return;
    }
    EI_DYN_SHARED(uint8_t, left);
    const size_t bytes = 2 * sizeof(Left<TYPE, WARPS, ROWS>);
    const size_t last_bytes = 2 * sizeof(Left<LAST, WARPS, ROWS>);
    Normed<WARPS, ROWS> normed = {x, gather, norm, eps, is_normed != 0, k, first_row, n_rows};
    place(normed, left, bytes < last_bytes ? last_bytes : bytes);
    const int block = blockIdx.x;
    const int before_last = blocks_0 + blocks_1;
    const bool is_last = block >= before_last;
    Part part = {w_0, bias_0, residual, y_0, n_0, block, blocks_0};
    if (is_last) {
        part = {w_2, bias_2, nullptr, y_2, n_2, block - before_last, (int)gridDim.x - before_last};
    } else if (block >= blocks_0) {
        part = {w_1, bias_1, nullptr, y_1, n_1, block - blocks_0, blocks_1};
    }
    if (!IS_SAME<TYPE, LAST> && is_last) {
        multiply_part<LAST>(part, normed, left);
    } else {
        multiply_part<TYPE>(part, normed, left);
    }
}
