// The one name of CoreFoundation that metal-cpp's headers need.
#pragma once
typedef double CFTimeInterval;
