// Where a kernel begins to read what those ahead of it have left.
#pragma once

// Waits for that, where the kernel is a part of another one: see joined.cuh. All threads of a block
// come here, however often.
#ifndef EI_AWAIT_INPUT
#define EI_AWAIT_INPUT()
#endif
