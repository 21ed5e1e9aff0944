"""Workers and the process that started them."""

import os
import threading

from data_pipelines import processes


def test_a_process_ends_with_the_one_that_started_it():
    """Whose end closes a pipe; `test_tokenize_data` kills such a process."""
    reading, writing = os.pipe()
    codes = []
    waiting = threading.Thread(target=processes._end_with, args=(reading, codes.append))
    waiting.start()
    assert not codes
    os.close(writing)
    waiting.join()
    os.close(reading)
    assert codes == [1]
