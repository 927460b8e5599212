/* The regions of an engine, by address. */
#ifndef AU_REGIONS_H
#define AU_REGIONS_H

#include "engine.h"
#include "region.h"

#include <stdbool.h>
#include <stdint.h>

int au_engine_add_region(struct au_engine *engine, struct au_region *region);
void au_engine_remove_region(struct au_engine *engine, struct au_region *region);
/* The region that holds `address`, or NULL.  With the engine's lock held. */
struct au_region *au_engine_region_at(struct au_engine *engine, uint64_t address);

/* Call the contents of a region by a name, which is cut where it is too long; and find the name,
 * of AU_REGION_NAME bytes at most, and the offset for the address of a page: false if there is none. */
void au_engine_name(struct au_region *region, const char *name);
bool au_engine_describe(struct au_engine *engine, uint64_t page, char *name, uint64_t *offset);

/* In a forked child. */
void au_engine_forked(struct au_engine *engine);

#endif
