"""Films: frames out of files and streams, and the frame that is on screen at each sample."""

from .clock import Clock
from .frames import (
    Clip,
    EncodedFrames,
    FittedFrames,
    FrameFolder,
    Picture,
    as_list_of_videos,
    frames_to_tensor,
    is_array,
    is_list_of_films,
    is_video_file,
)
from .reader import (
    VideoReadError,
    checked_frame_rate,
    iter_frames,
    lacks_resources,
    probe,
    progress_bar,
    read_video,
)
from .stream import VideoStream
