/* What Python may call of foreign.h. */

int64_t au_foreign_put(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
		       uint64_t page_size);
int au_foreign_alive(int fd);
