"""A published model on disk, read and verified piece by piece: all of it, or a few experts.

Opening an artifact checks the manifest, the small files and the sizes of the weights files. A tensor's digest is
checked when it is first asked for, before anyone sees it; what is never asked for is never read. Tensors are views of
the mapped files, so they cost no memory of their own until they are converted.

Shape suffixes: D model width, E experts, F width of one expert.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dsmoe_ray.artifact.layout import expert_matrices, expert_name, is_stacked, model_shapes, stacked_name
from dsmoe_ray.artifact.manifest import read_index
from dsmoe_ray.artifact.side_files import SideFiles, read_side_files
from dsmoe_ray.artifact.weights_file import WeightsFile, digest_tensor
from dsmoe_ray.errors import ArtifactError
from dsmoe_ray.model.config import MoeConfig


def load_artifact(directory: Path) -> "Artifact":
    """Open an artifact: everything but the weights is read and verified.

    Raises:
        ArtifactError: there is none, or it is damaged, incomplete or of an unknown format; names the file.
    """
    return Artifact(read_side_files(directory))


class Artifact:
    """An opened artifact; see ``load_artifact``."""

    def __init__(self, side_files: SideFiles) -> None:
        directory, manifest = side_files.directory, side_files.manifest
        self.side_files = side_files
        self.directory = directory
        self.manifest = manifest
        self.model_config = side_files.model_config
        self.generation_config = side_files.generation_config
        self.tokenizer_json = side_files.tokenizer_json
        self.chat_template = side_files.chat_template
        self._file_of = read_index(directory, manifest)
        self._verified: set[str] = set()
        # Opened, not read: a missing or shortened file is told now and not in mid-request.
        self._files = {
            name: WeightsFile(directory / name, size_bytes=file.size_bytes, header_sha256=file.header_sha256)
            for name, file in manifest.weight_files.items()
        }
        self._check_headers()

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a text; see ``SideFiles``."""
        return self.side_files.eos_token_ids

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights files."""
        return sum(file.size_bytes for file in self.manifest.weight_files.values())

    def load_state_dict(
        self, dtype: torch.dtype | None = None, *, with_experts: bool = True
    ) -> dict[str, torch.Tensor]:
        """Return all parameters of ``Transformer`` by name, the experts of a layer stacked ``(E, F, D)``.

        Args:
            dtype: Converts, which copies; by default tensors keep their type and are views of the files.
            with_experts: False leaves the FFN experts out, neither verified nor read.

        Raises:
            ArtifactError: a tensor does not match its digest; names it.
        """
        shapes = model_shapes(self.model_config)
        if with_experts:
            self.verify()
        else:
            shapes = {name: shape for name, shape in shapes.items() if not is_stacked(name)}
            self._verify(list(shapes))
        state = {}
        for name, shape in shapes.items():
            tensor = self._stack(name, range(shape[0])) if is_stacked(name) else self._view(name)
            state[name] = tensor if dtype is None else tensor.to(dtype)
        return state

    def load_parameter(self, name: str) -> torch.Tensor:
        """Return one parameter of ``Transformer`` by its name, verified; experts stacked ``(E, F, D)``.

        Raises:
            ArtifactError: it does not match its digest.
            KeyError: there is no such parameter.
        """
        if not is_stacked(name):
            self._verify([name])
            return self._view(name)
        everyone = range(model_shapes(self.model_config)[name][0])
        self._verify([expert_name(name, expert_id) for expert_id in everyone])
        return self._stack(name, everyone)

    def load_experts(self, layer: int, expert_ids: Iterable[int]) -> dict[int, dict[str, torch.Tensor]]:
        """Return the matrices ``w1``, ``w2`` and, for SwiGLU, ``w3`` of some FFN experts, each ``(F, D)``.

        Only these are read and verified.

        Raises:
            ArtifactError: a tensor does not match its digest; names it.
            ValueError: there is no such layer or expert.
        """
        wanted = list(expert_ids)
        names = {
            expert_id: {matrix: expert_name(self._stacked(layer, matrix), expert_id) for matrix in self._matrices}
            for expert_id in wanted
        }
        num_experts = self._num_experts
        impossible = [expert_id for expert_id in wanted if not 0 <= expert_id < num_experts]
        if impossible:
            raise ValueError(f"expert ids must be in [0, {num_experts}); got {impossible}")
        every_name = [name for by_matrix in names.values() for name in by_matrix.values()]
        for name in every_name:
            self._files[self._file_of[name]].prefetch(name)
        self._verify(every_name)
        return {
            expert_id: {matrix: self._view(name) for matrix, name in by_matrix.items()}
            for expert_id, by_matrix in names.items()
        }

    def view_experts(self, layer: int) -> dict[str, torch.Tensor]:
        """Return each matrix of all FFN experts of a layer, stacked ``(E, F, D)``; nothing is read or verified.

        For computing with those experts that ``load_experts`` has returned.

        Raises:
            ArtifactError: the experts do not lie one after another.
            ValueError: there is no such layer, or there are no experts.
        """
        everyone = range(self._num_experts)
        return {matrix: self._stack(self._stacked(layer, matrix), everyone) for matrix in self._matrices}

    def release_expert(self, layer: int, expert_id: int) -> None:
        """Let go of the memory that one FFN expert takes; see ``release_pages``."""
        for matrix in self._matrices:
            name = expert_name(self._stacked(layer, matrix), expert_id)
            self._files[self._file_of[name]].release_tensor(name)

    def verify(self) -> None:
        """Check the digest of every tensor that was not checked yet.

        Raises:
            ArtifactError: one does not match; names it.
        """
        self._verify(list(self.manifest.tensors))

    def release_pages(self) -> None:
        """Let go of the memory that verifying took: what is not used, cold experts say, stays on disk from now on.

        Tensors stay valid, but what was written to one is lost.
        """
        for file in self._files.values():
            file.release_pages()

    @property
    def _num_experts(self) -> int:
        ffn = self.model_config.ffn
        if not isinstance(ffn, MoeConfig):
            raise ValueError("this model has a dense FFN: there are no experts to load")
        return ffn.num_experts

    @property
    def _matrices(self) -> tuple[str, ...]:
        return expert_matrices(self.model_config)

    def _stacked(self, layer: int, matrix: str) -> str:
        if not 0 <= layer < self.model_config.num_layers:
            raise ValueError(f"layer must be in [0, {self.model_config.num_layers}); got {layer}")
        return stacked_name(layer, matrix)

    def _view(self, name: str) -> torch.Tensor:
        return self._files[self._file_of[name]].view(name)

    def _stack(self, stacked: str, expert_ids: Sequence[int]) -> torch.Tensor:
        names = [expert_name(stacked, expert_id) for expert_id in expert_ids]
        [file_name, *others] = {self._file_of[name] for name in names}
        if others:
            raise ArtifactError(f"{self.directory}: {stacked} is spread over several files; write the artifact anew.")
        return self._files[file_name].view_stacked(names)

    def _verify(self, names: Sequence[str]) -> None:
        unverified = [name for name in names if name not in self._verified]
        # Hashing releases the interpreter lock, so it runs on all cores at once.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, sha256 in zip(unverified, pool.map(self._digest, unverified), strict=True):
                if sha256 != self.manifest.tensors[name].sha256:
                    raise ArtifactError(
                        f"{self.directory / self._file_of[name]}: {name} does not match its SHA-256 digest: "
                        "its bytes changed. Copy the artifact from its source again."
                    )
                self._verified.add(name)

    def _digest(self, name: str) -> str:
        return digest_tensor(self._view(name))

    def _check_headers(self) -> None:
        """Check that the files hold the tensors that the manifest lists, where the index says."""
        for name, expected in self.manifest.tensors.items():
            file = self._files[self._file_of[name]]
            entry = file.tensors.get(name)
            if entry is None:
                raise ArtifactError(f"{file.path} lacks {name}, which the index places there. Write the artifact anew.")
            if (entry.dtype, entry.shape) != (expected.dtype, expected.shape):
                raise ArtifactError(
                    f"{file.path}: {name} is {entry.dtype} {entry.shape}; "
                    f"the manifest says {expected.dtype} {expected.shape}. Copy the artifact from its source again."
                )
