/* All of the native core, for the module that Python imports. */
#ifndef AU_NATIVE_H
#define AU_NATIVE_H

#include "abi.h"
#include "attach.h"
#include "children.h"
#include "counters.h"
#include "demand.h"
#include "engine.h"
#include "error_page.h"
#include "foreign.h"
#include "gil.h"
#include "guard.h"
#include "handler.h"
#include "inherit.h"
#include "kick.h"
#include "pagemap.h"
#include "region.h"
#include "registry.h"
#include "rescue.h"
#include "sentry.h"
#include "slots.h"
#include "sys.h"
#include "uapi.h"

#endif
