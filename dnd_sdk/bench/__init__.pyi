from .adapting import bench_adapt as bench_adapt, render_adapting as render_adapting
from .training import bench_train as bench_train, render_training as render_training
