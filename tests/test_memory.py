"""Memory as the system sees it: what a token costs is what the format says, and no copy of the history stays anywhere."""

import json
import subprocess
import sys

from support import with_steady_malloc
from tqext import Recipe

SCRIPT = """
import json, os
import mlx.core as mx
from tqext import TurboQuantKVCache

mx.set_cache_limit(0)
H, D, CHUNK, LAYERS = 8, 128, 512, 2

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

caches = [TurboQuantKVCache() for _ in range(LAYERS)]
measured = []
for i in range(48):
    for cache in caches:
        k, v, q = (mx.random.normal((1, heads, CHUNK, D)).astype(mx.float16) for heads in (H, H, H))
        snapshot = cache.update_and_fetch(k, v)[0]
        # Attention of one row keeps the run short; the whole chunk is in the snapshot all the same.
        mx.eval(snapshot.attend(q[:, :, :1], D**-0.5), cache.state)
        del k, v, q, snapshot
    measured.append((caches[0].n_coded, resident()))
print(json.dumps(measured))
"""


def test_resident_memory_grows_by_the_formats_bytes():
    run = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=600, env=with_steady_malloc())
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    (n_before, before), (n_after, after) = measured[7], measured[-1]
    per_token = (after - before) / (n_after - n_before)
    expected = 2 * 8 * Recipe().bytes_per_token(128)
    assert abs(per_token / expected - 1) < 0.05, (per_token, expected)
