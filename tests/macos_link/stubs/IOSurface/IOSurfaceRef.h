// The one name of IOSurface that metal-cpp's headers need.
#pragma once
typedef struct __IOSurface* IOSurfaceRef;
