from .adapting import bench_adapt as bench_adapt, render_adapting as render_adapting
from .growth import SIZES as SIZES, bench_store as bench_store, render_store as render_store
from .serving import bench_engine as bench_engine, render_engine as render_engine
from .tiers import Deployment as Deployment, render_tiers as render_tiers, simulate as simulate
from .timing import host as host, ratio as ratio
from .training import bench_train as bench_train, render_training as render_training
from .workload import FULL as FULL, QUICK as QUICK, Sizes as Sizes
