from .messages import Prompt as Prompt, last_user_text as last_user_text, with_role as with_role
from .schema import (
    MAX_SCHEMA_BYTES as MAX_SCHEMA_BYTES,
    checked_schema as checked_schema,
    closed_schema as closed_schema,
    schema_places as schema_places,
)
from .template import (
    Messages as Messages,
    Tools as Tools,
    check_renders_tools as check_renders_tools,
    checked_chat as checked_chat,
    checked_tools as checked_tools,
    option_ids as option_ids,
    prompt_ids as prompt_ids,
    renders_tools as renders_tools,
    tools_not_shown as tools_not_shown,
)
from .tool_calls import (
    Reading as Reading,
    ToolCall as ToolCall,
    new_call_id as new_call_id,
    plain_so_far as plain_so_far,
    read_answer as read_answer,
)
from .tool_choice import ToolOffer as ToolOffer, call_schema as call_schema, choose_tools as choose_tools
