"""A forward pass that stops in the middle, and goes on when another one has come as far.

Why: a layer's weights can be fitted to what the original gives at the same place, on what the fitted layers in front
of it give, in one forward pass of each network, knowing nothing of their graphs and holding nothing but what the two
passes hold at that moment.

Why a thread: the pass is stopped in somebody's `forward`. Only one of the two runs at a time, so nothing is shared in a
way that plain code would not share it, and the result does not depend on any scheduler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class Walk:
    """Something that runs as far as its next stop, without gradients.

    Args:
        run: what is to be run. It is given `stop`, which hands something over to who called `go_on`.

    Example:
        >>> walk = Walk(lambda stop: [stop(number) for number in (1, 2)])
        >>> walk.go_on(), walk.go_on(), walk.go_on()
        (1, 2, None)
    """

    def __init__(self, run: Callable[[Callable[[Any], None]], Any]) -> None:
        self._run = run
        self._thread = threading.Thread(target=self._whole, daemon=True)
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._handed: Any = None
        self._error: BaseException | None = None
        self._is_given_up = False
        self._is_over = False

    def go_on(self) -> Any:
        """What is handed over at the next stop; None where there is none.

        Raises:
            whatever the run raises.
        """
        self._handed = None
        if not self._is_over:
            self._start_or_release()
            self._theirs.acquire()
        if self._error is not None:
            raise self._error
        return self._handed

    def give_up(self) -> None:
        """End it where it stands, if it is not over."""
        if not self._is_over and self._thread.ident is not None:
            self._is_given_up = True
            self._mine.release()
            self._thread.join()

    def _start_or_release(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._mine.release()

    def _stop(self, handed: Any) -> None:
        self._handed = handed
        self._theirs.release()
        self._mine.acquire()
        if self._is_given_up:
            raise _GivenUp

    def _whole(self) -> None:
        try:
            with torch.no_grad():
                self._run(self._stop)
        except _GivenUp:
            pass
        except BaseException as error:  # raised again where somebody hears it
            self._error = error
        self._is_over = True
        self._theirs.release()


class _GivenUp(BaseException):
    """Not an Exception: no `except Exception` in somebody's forward may hold it up."""
