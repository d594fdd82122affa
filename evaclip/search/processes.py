"""One piece of work shared among processes, which report how far they are."""

import multiprocessing
import queue
from collections.abc import Callable, Iterator
from typing import Any

from evaclip.errors import InputError
from evaclip.log import quiet

Share = Callable[[Any, list[int], int, int], Iterator[int]]
# Seconds between two looks at whether a process has died without a word.
LOOK_EVERY = 1.0


def shared(share: Share, work: Any, parts: list[int], processes: int) -> Iterator[int]:
    """Calls `share(work, some of the parts, process, processes)` in each process, and yields what all of them yield.

    `share` is a module's function and `work` can be pickled: processes are started anew, as CUDA needs it. With one
    process it runs here. Raises the InputError of the first process that has one, or names one that died; the others
    are ended then, and also when the caller stops.
    """
    processes = max(1, min(processes, len(parts)))
    if processes == 1:
        yield from share(work, parts, 0, 1)
        return
    context = multiprocessing.get_context("spawn")
    reports: Any = context.Queue()
    peers = [
        context.Process(target=_run, args=(share, work, parts[n::processes], n, processes, reports), daemon=True)
        for n in range(processes)
    ]
    for peer in peers:
        peer.start()
    try:
        running = processes
        while running:
            try:
                report = reports.get(timeout=LOOK_EVERY)
            except queue.Empty:
                lost = [peer for peer in peers if peer.exitcode not in (None, 0)]
                if lost and reports.empty():
                    raise InputError(
                        f"a process ended with status {lost[0].exitcode}; what is written stays: start it again"
                    ) from None
                continue
            if isinstance(report, int):
                yield report
            elif report is None:
                running -= 1
            else:
                raise InputError(report)
    finally:
        for peer in peers:
            peer.terminate()
            peer.join()


def _run(share: Share, work: Any, parts: list[int], process: int, processes: int, reports: Any) -> None:
    try:
        with quiet(process > 0):
            for count in share(work, parts, process, processes):
                reports.put(count)
        reports.put(None)
    except InputError as error:
        reports.put(str(error))
    except KeyboardInterrupt:
        pass
