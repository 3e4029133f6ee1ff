from .reading import (
    MAX_ITEMS as MAX_ITEMS,
    MAX_PROMPTS as MAX_PROMPTS,
    PromptSet as PromptSet,
    clean_prompts as clean_prompts,
    prompt_set_hash as prompt_set_hash,
    read_prompts as read_prompts,
)
from .roles import Role as Role, as_role as as_role, read_role as read_role, role_text as role_text
from .shapes import checked_text as checked_text, user_text as user_text
from .sources import MAX_FILE_BYTES as MAX_FILE_BYTES, MAX_LINE_BYTES as MAX_LINE_BYTES
