"""Runs the models of `golden_models.py` through llama.cpp and keeps some of its logits.

`python -m tests.make_goldens LLAMA_CPP BUILD [NAME ...]`: the source tree, and the folder in which
it was built with shared libraries. Needs a C compiler; no test does.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .golden_models import GOLDENS, N_CTX, N_PROMPT, PROMPT, ROWS, VOCAB

FOLDER = Path(__file__).parent / "goldens"

# K and V in float32, attention written out, one thread: what the model says, and no more.
DRIVER = r"""
#include "llama.h"
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char ** argv) {
    llama_backend_init();
    struct llama_model_params mp = llama_model_default_params();
    struct llama_model * model = llama_model_load_from_file(argv[1], mp);
    if (!model) return 1;
    struct llama_context_params cp = llama_context_default_params();
    cp.n_ctx = cp.n_batch = cp.n_ubatch = atoi(argv[2]);
    cp.n_threads = cp.n_threads_batch = 1;
    cp.type_k = cp.type_v = GGML_TYPE_F32;
    cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    struct llama_context * context = llama_init_from_model(model, cp);
    if (!context) return 2;
    const int n = argc - 3, n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    struct llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; i++) {
        batch.token[i] = atoi(argv[3 + i]);
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(context, batch)) return 3;
    fwrite(llama_get_logits(context), sizeof(float), (size_t) n * n_vocab, stdout);
    return 0;
}
"""


def build(source: Path, built: Path, folder: Path) -> Path:
    """The driver, linked to the libraries that are built."""
    code, program, libraries = folder / "logits.c", folder / "logits", built / "bin"
    code.write_text(DRIVER, encoding="utf-8")
    headers = [f"-I{source / each}" for each in ("include", "ggml/include")]
    command = ["cc", "-O1", *headers, str(code), "-o", str(program), f"-L{libraries}"]
    command += ["-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    subprocess.run(command, check=True)
    return program


def logits_of(program: Path, path: Path) -> NDArray[np.float32]:
    """(N_PROMPT, VOCAB)."""
    command = [str(program), str(path), str(N_CTX), *map(str, PROMPT)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode(errors="replace"))
    return np.frombuffer(done.stdout, np.float32).reshape(N_PROMPT, VOCAB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("built", type=Path)
    parser.add_argument("names", nargs="*", default=list(GOLDENS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build(options.source, options.built, folder)
        for each in options.names:
            draft = GOLDENS[each].draft()
            rows = logits_of(program, draft.write(folder / f"{each}.gguf"))[ROWS]
            spread = (rows.max(axis=1) - rows.min(axis=1)).min()
            np.savez(FOLDER / f"{each}.npz", logits=rows, digest=np.array(draft.digest()))
            print(f"{each}: spread of logits at least {spread:.2f}")


if __name__ == "__main__":
    main()
