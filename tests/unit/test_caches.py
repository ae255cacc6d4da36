"""What is made once for many: by one at a time, whose lock is gone afterwards."""

import threading
import time

from base.caches import one_builder


def test_one_builds_at_a_time_and_no_lock_is_left(tmp_path):
    inside = []
    most = []

    def build():
        for _ in range(20):
            with one_builder(tmp_path / "made.index"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)  # for the others to come
                inside.pop()

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 120 and max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_builder_that_fails_leaves_no_lock(tmp_path):
    try:
        with one_builder(tmp_path / "folder/made.index"):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert list((tmp_path / "folder").iterdir()) == []
