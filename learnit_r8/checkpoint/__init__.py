"""Durable state on disk: manifest, hashes, retention, fallback."""

from learnit_r8.checkpoint.directory import Entry, Retention, new_run
from learnit_r8.checkpoint.finding import resolve
from learnit_r8.checkpoint.manifest import LoadedCheckpoint, Manifest, SavedCheckpoint
from learnit_r8.checkpoint.remote import shown
from learnit_r8.checkpoint.remote_store import open_store
from learnit_r8.checkpoint.storage import FileRecord, FileSystem
from learnit_r8.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointStore",
    "Entry",
    "FileRecord",
    "FileSystem",
    "LoadedCheckpoint",
    "Manifest",
    "Retention",
    "SavedCheckpoint",
    "new_run",
    "open_store",
    "resolve",
    "shown",
]
