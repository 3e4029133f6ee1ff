from .adapting import bench_adapt as bench_adapt, render_adapting as render_adapting
from .growth import SIZES as SIZES, bench_store as bench_store, render_store as render_store
from .training import bench_train as bench_train, render_training as render_training
