from .app import create_app as create_app
from .overhead import bench_serve as bench_serve, render_serve as render_serve
from .running import Listening as Listening, serve as serve
from .settings import ServerSettings as ServerSettings
