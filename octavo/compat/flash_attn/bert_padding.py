"""`flash_attn.bert_padding`."""

from octavo.ops.padding import index_first_axis as index_first_axis
from octavo.ops.padding import index_put_first_axis as index_put_first_axis
from octavo.ops.padding import pad_input as pad_input
from octavo.ops.padding import unpad_input as unpad_input
from octavo.ops.padding import unpad_input_for_concatenated_sequences as unpad_input_for_concatenated_sequences
