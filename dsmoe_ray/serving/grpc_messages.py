"""The messages of the gRPC API as classes, made of ``grpc_schema/schema.binpb`` when this is imported.

That file is what ``protoc --include_imports`` says of the ``.proto`` files beside it, which are what people read and
clients compile; a test compares them. So nothing here depends on a version of the compiler or needs it at run time.
"""

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SCHEMA = Path(__file__).parent / "grpc_schema"
COMPILED = SCHEMA / "schema.binpb"


def _load() -> descriptor_pool.DescriptorPool:
    # A pool of its own: other libraries of the process may know the health protocol too.
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(COMPILED.read_bytes()).file:
        pool.Add(file)
    return pool


_POOL = _load()


def _find(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(name))


GenerateRequest = _find("dsmoe.v1.GenerateRequest")
GenerateReply = _find("dsmoe.v1.GenerateReply")
SequenceOutput = _find("dsmoe.v1.SequenceOutput")
TokenLogprob = _find("dsmoe.v1.TokenLogprob")
ScoredToken = _find("dsmoe.v1.ScoredToken")
ListModelsRequest = _find("dsmoe.v1.ListModelsRequest")
ListModelsReply = _find("dsmoe.v1.ListModelsReply")
Model = _find("dsmoe.v1.Model")
HealthCheckRequest = _find("grpc.health.v1.HealthCheckRequest")
HealthCheckResponse = _find("grpc.health.v1.HealthCheckResponse")

FINISH_REASONS = {
    None: 0,
    "stop": _POOL.FindEnumTypeByName("dsmoe.v1.FinishReason").values_by_name["FINISH_REASON_STOP"].number,
    "length": _POOL.FindEnumTypeByName("dsmoe.v1.FinishReason").values_by_name["FINISH_REASON_LENGTH"].number,
}
