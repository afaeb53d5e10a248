// What every kernel does first where it may begin before the one ahead of it has ended.
#pragma once

// Waits until the kernel ahead has ended and all that it wrote is seen, then lets the next one
// begin: so whatever ran before the one ahead has ended, too.
static __device__ __forceinline__ void ei_wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : : : "memory");
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}
