"""The schema of the gRPC API: what people read is what the program uses."""

import pytest
from google.protobuf import descriptor_pb2

from dsmoe_ray.serving import grpc_messages as messages

FILES = ["generation.proto", "health.proto"]


def test_the_compiled_schema_is_what_the_compiler_makes_of_the_text(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    compiled = tmp_path / "schema.binpb"
    assert sorted(path.name for path in messages.SCHEMA.glob("*.proto")) == FILES
    arguments = ["protoc", f"-I{messages.SCHEMA}", f"--descriptor_set_out={compiled}", *FILES]
    assert protoc.main(arguments) == 0
    made, kept = (
        descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()) for path in (compiled, messages.COMPILED)
    )
    hint = f"cd {messages.SCHEMA}; python -m grpc_tools.protoc -I. --descriptor_set_out=schema.binpb {' '.join(FILES)}"
    assert made == kept, f"compile the schema again: {hint}"


def test_a_message_keeps_what_is_absent_apart_from_zero():
    request = messages.GenerateRequest(text="a", max_tokens=0)
    read = messages.GenerateRequest.FromString(request.SerializeToString())
    assert (read.HasField("max_tokens"), read.HasField("seed"), read.WhichOneof("prompt")) == (True, False, "text")
