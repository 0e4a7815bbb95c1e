"""Watch a film once and ask many questions: sessions, answers, and saved states."""

from .answering import VideoChat, checked_candidates, checked_questions
from .state_file import StateFileError
from .video_session import VideoSession, VideoStreamError, watch_together
