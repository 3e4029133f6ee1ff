from .app import create_app as create_app
from .running import Listening as Listening, serve as serve
from .settings import ServerSettings as ServerSettings
