from .answers import Adapted as Adapted, Answer as Answer, Routed as Routed, StoredAdapter as StoredAdapter
from .client import ServerClient as ServerClient
from .presence import (
    PLACES as PLACES,
    Presence as Presence,
    base_key as base_key,
    find_server as find_server,
    read_presence as read_presence,
    remove_presence as remove_presence,
    write_presence as write_presence,
)
from .stopping import stop_server as stop_server
from .stream import AnswerStream as AnswerStream
