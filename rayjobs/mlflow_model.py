"""What MLflow runs when it loads a registered version on its own: ``mlflow.pyfunc.load_model("models:/cad-alignment@champion")``.

MLflow copies this file and the package ``cad_models`` beside the weights, so a version needs no checkout of this project, and no pickle.

Input: one row a query, columns ``query`` (path of an image or a mesh) and, for tasks that search, ``gallery`` (path of a folder of meshes or of images). Output: rows of
query, rank, answer, score, direction, as ``infer.py`` writes them. Parameters: ``top_k``; ``options``, what ``--options.*`` of ``infer.py`` ask, as JSON:
``{"gallery_views": 24}``.
"""

from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext


class AnswersModel(PythonModel):
    """One ensemble as an MLflow model."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the ensemble, digests checked. MLflow passes ``context`` by keyword."""
        from pathlib import Path

        from cad_models.ensemble import load_ensemble

        self._ensemble = load_ensemble(Path(context.artifacts["ensemble"]))

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answers to every query; queries of the same gallery share its embedding.

        Raises:
            ValueError: a gallery is not there or does not fit its queries, a query cannot be read, or there is no such option; the message names it.
        """
        import json

        from cad_models.config import replace_all
        from cad_models.ensemble import InputProcessor, answer

        params, task = params or {}, self._ensemble.task
        top_k = int(params.get("top_k", 3))
        options = replace_all(task.infer_options(), json.loads(params.get("options") or "{}"))
        rows: list[dict[str, Any]] = []
        with InputProcessor(self._ensemble, options=options) as processor:
            galleries = model_input["gallery"].fillna("") if "gallery" in model_input else [""] * len(model_input)
            for gallery, asked in model_input.assign(gallery=galleries).groupby("gallery", sort=True):
                queries = list(dict.fromkeys(asked["query"]))
                requests = task.list_requests(queries, str(gallery) or None, options=options)
                answers, rejects = answer(self._ensemble, requests, processor, top_k=top_k)
                for item, reject in rejects:
                    if item.source in queries:
                        raise ValueError(f"query {item.source} cannot be read ({reject.reason}: {reject.detail})")
                rows += [
                    {"query": a.query, "rank": a.rank, "answer": a.answer, "score": a.score, "direction": a.direction} for a in answers
                ]
        return pd.DataFrame(rows, columns=["query", "rank", "answer", "score", "direction"])


mlflow.models.set_model(AnswersModel())
