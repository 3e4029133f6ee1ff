from .presence import (
    Presence as Presence,
    find_server as find_server,
    read_presence as read_presence,
    remove_presence as remove_presence,
    write_presence as write_presence,
)
