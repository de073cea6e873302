"""Small chat templates with the habits of real families that matter for loss masks."""

# Thinking of the turns before the last user message is dropped; a last turn without any gets an
# empty block; neighbouring tool messages share one user block (Qwen3).
THINKING_TEMPLATE = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role == 'user' %}{%- set ns.last = messages.index(m) %}{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}
{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif m.role == 'assistant' %}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thinking = '' %}
{%- if '</think>' in m.content %}
{%- set thinking = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thinking) %}
{{- '<think>\\n' + thinking + '\\n</think>\\n\\n' }}{%- endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\\n' + call.name + '\\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}GENERATION{%- endif %}"""

QWEN3 = THINKING_TEMPLATE.replace(
    "GENERATION",
    "{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
)
# The prompt opens the thinking itself (Qwen3.5).
QWEN3_5 = THINKING_TEMPLATE.replace("GENERATION", "{{- '<think>\\n' }}")

# Thinking is cut out of every answer, also the last (DeepSeek-R1-Distill).
DISTILL = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}
{%- elif m.role == 'assistant' %}
{{- '<|Assistant|>' + m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>' }}
{%- else %}{{- m.content }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""

# A count of the messages in front: every turn rewrites the beginning.
REWRITING = """\
{{- messages | length }}{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
