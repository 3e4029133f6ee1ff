from .app import create_app as create_app
from .guard import Guard as Guard
from .overhead import bench_serve as bench_serve, render_serve as render_serve
from .problems import Problem as Problem, RequestError as RequestError, problem_of as problem_of
from .running import Listening as Listening, serve as serve
from .settings import ServerSettings as ServerSettings
from .wire import event as event
