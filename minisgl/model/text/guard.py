"""Keeps the faults of damaged tokenizer files inside one sentence.  No torch.

The tokenizers library is written in Rust, and some files make it panic.  That raises a PanicException, which is no Exception,
and prints a trace to standard error before.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers

from minisgl.errors import UserError
from minisgl.model.checkpoint.files import reason

MAX_UNUSED_IDS = 1 << 20  # ids between the tokens: tables by id are made of all


@contextmanager
def one_sentence(failed: str) -> Iterator[None]:
    """Make every error in here a UserError, `failed` and the reason.

    What the process writes to standard error meanwhile appears afterwards, or not at all after an error.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:
            held.truncate(0)
            raise UserError(f"{failed}: {reason(e)}.") from e
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            os.write(2, held.read())


def check_tokenizer(backend: tokenizers.Tokenizer, source: str) -> None:
    """Try the tokenizer.  Raises UserError naming the file `source` when it cannot encode, or has unlikely ids."""
    backend.no_truncation()  # a file may carry the settings of its training
    backend.no_padding()
    with one_sentence(f"{source}: cannot encode a text"):
        ids = backend.encode("a b", add_special_tokens=True).ids
    vocabulary = backend.get_vocab(with_added_tokens=True)
    token, last = max(vocabulary.items(), key=lambda item: item[1], default=("", 0))
    if last > len(vocabulary) + MAX_UNUSED_IDS:
        raise UserError(f"{source}: token {token!r:.80} has the id {last}, and there are {len(vocabulary)} tokens.")
    if max(ids, default=0) > last:
        raise UserError(f"{source}: its post_processor adds token {max(ids)}, and the last one is {last}.")
