/* Compares uapi.h with the system's headers, at compile time, wherever those know the name.
 *
 * It makes no code. A failure here means that uapi.h is wrong, or that the ABI of this architecture
 * differs: neither may be built.
 */
#include <linux/fs.h>
#include <linux/userfaultfd.h>
#include <stddef.h>

#include "uapi.h"

#define SAME(ours, theirs) \
	_Static_assert((unsigned long long)(ours) == (unsigned long long)(theirs), #ours)
#define SAME_SIZE(ours, theirs) _Static_assert(sizeof(struct ours) == sizeof(struct theirs), #ours)
#define SAME_FIELD(ours, theirs, field) \
	_Static_assert(offsetof(struct ours, field) == offsetof(struct theirs, field), #ours "." #field)


#ifdef UFFD_USER_MODE_ONLY
SAME(AU_USER_MODE_ONLY, UFFD_USER_MODE_ONLY);
#endif

#ifdef USERFAULTFD_IOC_NEW
SAME(AU_USERFAULTFD_IOC_NEW, USERFAULTFD_IOC_NEW);
#endif

SAME(AU_UFFD_API, UFFD_API);

#ifdef UFFD_FEATURE_PAGEFAULT_FLAG_WP
SAME(AU_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_PAGEFAULT_FLAG_WP);
#endif
#ifdef UFFD_FEATURE_EVENT_FORK
SAME(AU_FEATURE_EVENT_FORK, UFFD_FEATURE_EVENT_FORK);
#endif
#ifdef UFFD_FEATURE_EVENT_REMAP
SAME(AU_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_REMAP);
#endif
#ifdef UFFD_FEATURE_EVENT_REMOVE
SAME(AU_FEATURE_EVENT_REMOVE, UFFD_FEATURE_EVENT_REMOVE);
#endif
#ifdef UFFD_FEATURE_MISSING_HUGETLBFS
SAME(AU_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_HUGETLBFS);
#endif
#ifdef UFFD_FEATURE_MISSING_SHMEM
SAME(AU_FEATURE_MISSING_SHMEM, UFFD_FEATURE_MISSING_SHMEM);
#endif
#ifdef UFFD_FEATURE_EVENT_UNMAP
SAME(AU_FEATURE_EVENT_UNMAP, UFFD_FEATURE_EVENT_UNMAP);
#endif
#ifdef UFFD_FEATURE_SIGBUS
SAME(AU_FEATURE_SIGBUS, UFFD_FEATURE_SIGBUS);
#endif
#ifdef UFFD_FEATURE_THREAD_ID
SAME(AU_FEATURE_THREAD_ID, UFFD_FEATURE_THREAD_ID);
#endif
#ifdef UFFD_FEATURE_MINOR_HUGETLBFS
SAME(AU_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_HUGETLBFS);
#endif
#ifdef UFFD_FEATURE_MINOR_SHMEM
SAME(AU_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MINOR_SHMEM);
#endif
#ifdef UFFD_FEATURE_EXACT_ADDRESS
SAME(AU_FEATURE_EXACT_ADDRESS, UFFD_FEATURE_EXACT_ADDRESS);
#endif
#ifdef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
SAME(AU_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
#endif
#ifdef UFFD_FEATURE_WP_UNPOPULATED
SAME(AU_FEATURE_WP_UNPOPULATED, UFFD_FEATURE_WP_UNPOPULATED);
#endif
#ifdef UFFD_FEATURE_POISON
SAME(AU_FEATURE_POISON, UFFD_FEATURE_POISON);
#endif
#ifdef UFFD_FEATURE_WP_ASYNC
SAME(AU_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_ASYNC);
#endif
#ifdef UFFD_FEATURE_MOVE
SAME(AU_FEATURE_MOVE, UFFD_FEATURE_MOVE);
#endif
#ifdef UFFD_FEATURE_RWP
SAME(AU_FEATURE_RWP, UFFD_FEATURE_RWP);
#endif
#ifdef UFFD_FEATURE_RWP_ASYNC
SAME(AU_FEATURE_RWP_ASYNC, UFFD_FEATURE_RWP_ASYNC);
#endif

#ifdef UFFDIO_API
SAME_SIZE(au_uffdio_api, uffdio_api);
SAME_FIELD(au_uffdio_api, uffdio_api, api);
SAME_FIELD(au_uffdio_api, uffdio_api, features);
SAME_FIELD(au_uffdio_api, uffdio_api, ioctls);
#endif

#ifdef UFFDIO_WAKE
SAME_SIZE(au_uffdio_range, uffdio_range);
SAME_FIELD(au_uffdio_range, uffdio_range, start);
SAME_FIELD(au_uffdio_range, uffdio_range, len);
#endif

#ifdef UFFDIO_REGISTER
SAME_SIZE(au_uffdio_register, uffdio_register);
SAME_FIELD(au_uffdio_register, uffdio_register, range);
SAME_FIELD(au_uffdio_register, uffdio_register, mode);
SAME_FIELD(au_uffdio_register, uffdio_register, ioctls);
#endif

#ifdef UFFDIO_COPY
SAME_SIZE(au_uffdio_copy, uffdio_copy);
SAME_FIELD(au_uffdio_copy, uffdio_copy, dst);
SAME_FIELD(au_uffdio_copy, uffdio_copy, src);
SAME_FIELD(au_uffdio_copy, uffdio_copy, len);
SAME_FIELD(au_uffdio_copy, uffdio_copy, mode);
SAME_FIELD(au_uffdio_copy, uffdio_copy, copy);
#endif

#ifdef UFFDIO_ZEROPAGE
SAME_SIZE(au_uffdio_zeropage, uffdio_zeropage);
SAME_FIELD(au_uffdio_zeropage, uffdio_zeropage, range);
SAME_FIELD(au_uffdio_zeropage, uffdio_zeropage, mode);
SAME_FIELD(au_uffdio_zeropage, uffdio_zeropage, zeropage);
#endif

#ifdef UFFDIO_MOVE
SAME_SIZE(au_uffdio_move, uffdio_move);
SAME_FIELD(au_uffdio_move, uffdio_move, dst);
SAME_FIELD(au_uffdio_move, uffdio_move, src);
SAME_FIELD(au_uffdio_move, uffdio_move, len);
SAME_FIELD(au_uffdio_move, uffdio_move, mode);
SAME_FIELD(au_uffdio_move, uffdio_move, move);
#endif

#ifdef UFFDIO_WRITEPROTECT
SAME_SIZE(au_uffdio_writeprotect, uffdio_writeprotect);
SAME_FIELD(au_uffdio_writeprotect, uffdio_writeprotect, range);
SAME_FIELD(au_uffdio_writeprotect, uffdio_writeprotect, mode);
#endif

#ifdef UFFDIO_CONTINUE
SAME_SIZE(au_uffdio_continue, uffdio_continue);
SAME_FIELD(au_uffdio_continue, uffdio_continue, range);
SAME_FIELD(au_uffdio_continue, uffdio_continue, mode);
SAME_FIELD(au_uffdio_continue, uffdio_continue, mapped);
#endif

#ifdef UFFDIO_POISON
SAME_SIZE(au_uffdio_poison, uffdio_poison);
SAME_FIELD(au_uffdio_poison, uffdio_poison, range);
SAME_FIELD(au_uffdio_poison, uffdio_poison, mode);
SAME_FIELD(au_uffdio_poison, uffdio_poison, updated);
#endif

#ifdef UFFDIO_RWPROTECT
SAME_SIZE(au_uffdio_rwprotect, uffdio_rwprotect);
SAME_FIELD(au_uffdio_rwprotect, uffdio_rwprotect, range);
SAME_FIELD(au_uffdio_rwprotect, uffdio_rwprotect, mode);
#endif

#ifdef UFFDIO_SET_MODE
SAME_SIZE(au_uffdio_set_mode, uffdio_set_mode);
SAME_FIELD(au_uffdio_set_mode, uffdio_set_mode, enable);
SAME_FIELD(au_uffdio_set_mode, uffdio_set_mode, disable);
#endif

#ifdef UFFDIO_REGISTER
SAME(AU_UFFDIO_REGISTER, UFFDIO_REGISTER);
SAME(AU_UFFDIO_NR_REGISTER, _UFFDIO_REGISTER);
#endif

#ifdef UFFDIO_UNREGISTER
SAME(AU_UFFDIO_UNREGISTER, UFFDIO_UNREGISTER);
SAME(AU_UFFDIO_NR_UNREGISTER, _UFFDIO_UNREGISTER);
#endif

#ifdef UFFDIO_WAKE
SAME(AU_UFFDIO_WAKE, UFFDIO_WAKE);
SAME(AU_UFFDIO_NR_WAKE, _UFFDIO_WAKE);
#endif

#ifdef UFFDIO_COPY
SAME(AU_UFFDIO_COPY, UFFDIO_COPY);
SAME(AU_UFFDIO_NR_COPY, _UFFDIO_COPY);
#endif

#ifdef UFFDIO_ZEROPAGE
SAME(AU_UFFDIO_ZEROPAGE, UFFDIO_ZEROPAGE);
SAME(AU_UFFDIO_NR_ZEROPAGE, _UFFDIO_ZEROPAGE);
#endif

#ifdef UFFDIO_MOVE
SAME(AU_UFFDIO_MOVE, UFFDIO_MOVE);
SAME(AU_UFFDIO_NR_MOVE, _UFFDIO_MOVE);
#endif

#ifdef UFFDIO_WRITEPROTECT
SAME(AU_UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT);
SAME(AU_UFFDIO_NR_WRITEPROTECT, _UFFDIO_WRITEPROTECT);
#endif

#ifdef UFFDIO_CONTINUE
SAME(AU_UFFDIO_CONTINUE, UFFDIO_CONTINUE);
SAME(AU_UFFDIO_NR_CONTINUE, _UFFDIO_CONTINUE);
#endif

#ifdef UFFDIO_POISON
SAME(AU_UFFDIO_POISON, UFFDIO_POISON);
SAME(AU_UFFDIO_NR_POISON, _UFFDIO_POISON);
#endif

#ifdef UFFDIO_RWPROTECT
SAME(AU_UFFDIO_RWPROTECT, UFFDIO_RWPROTECT);
SAME(AU_UFFDIO_NR_RWPROTECT, _UFFDIO_RWPROTECT);
#endif

#ifdef UFFDIO_SET_MODE
SAME(AU_UFFDIO_SET_MODE, UFFDIO_SET_MODE);
SAME(AU_UFFDIO_NR_SET_MODE, _UFFDIO_SET_MODE);
#endif

#ifdef UFFDIO_API
SAME(AU_UFFDIO_API, UFFDIO_API);
SAME(AU_UFFDIO_NR_API, _UFFDIO_API);
#endif

#ifdef UFFDIO_REGISTER_MODE_MISSING
SAME(AU_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_MISSING);
#endif
#ifdef UFFDIO_REGISTER_MODE_WP
SAME(AU_REGISTER_MODE_WP, UFFDIO_REGISTER_MODE_WP);
#endif
#ifdef UFFDIO_REGISTER_MODE_MINOR
SAME(AU_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MINOR);
#endif
#ifdef UFFDIO_REGISTER_MODE_RWP
SAME(AU_REGISTER_MODE_RWP, UFFDIO_REGISTER_MODE_RWP);
#endif
#ifdef UFFDIO_COPY_MODE_DONTWAKE
SAME(AU_COPY_MODE_DONTWAKE, UFFDIO_COPY_MODE_DONTWAKE);
#endif
#ifdef UFFDIO_COPY_MODE_WP
SAME(AU_COPY_MODE_WP, UFFDIO_COPY_MODE_WP);
#endif
#ifdef UFFDIO_ZEROPAGE_MODE_DONTWAKE
SAME(AU_ZEROPAGE_MODE_DONTWAKE, UFFDIO_ZEROPAGE_MODE_DONTWAKE);
#endif
#ifdef UFFDIO_MOVE_MODE_DONTWAKE
SAME(AU_MOVE_MODE_DONTWAKE, UFFDIO_MOVE_MODE_DONTWAKE);
#endif
#ifdef UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES
SAME(AU_MOVE_MODE_ALLOW_SRC_HOLES, UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES);
#endif
#ifdef UFFDIO_WRITEPROTECT_MODE_WP
SAME(AU_WRITEPROTECT_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP);
#endif
#ifdef UFFDIO_WRITEPROTECT_MODE_DONTWAKE
SAME(AU_WRITEPROTECT_MODE_DONTWAKE, UFFDIO_WRITEPROTECT_MODE_DONTWAKE);
#endif
#ifdef UFFDIO_CONTINUE_MODE_DONTWAKE
SAME(AU_CONTINUE_MODE_DONTWAKE, UFFDIO_CONTINUE_MODE_DONTWAKE);
#endif
#ifdef UFFDIO_CONTINUE_MODE_WP
SAME(AU_CONTINUE_MODE_WP, UFFDIO_CONTINUE_MODE_WP);
#endif
#ifdef UFFDIO_POISON_MODE_DONTWAKE
SAME(AU_POISON_MODE_DONTWAKE, UFFDIO_POISON_MODE_DONTWAKE);
#endif
#ifdef UFFDIO_RWPROTECT_MODE_RWP
SAME(AU_RWPROTECT_MODE_RWP, UFFDIO_RWPROTECT_MODE_RWP);
#endif
#ifdef UFFDIO_RWPROTECT_MODE_DONTWAKE
SAME(AU_RWPROTECT_MODE_DONTWAKE, UFFDIO_RWPROTECT_MODE_DONTWAKE);
#endif

SAME_SIZE(au_uffd_msg, uffd_msg);
SAME_FIELD(au_uffd_msg, uffd_msg, event);
SAME_FIELD(au_uffd_msg, uffd_msg, reserved1);
SAME_FIELD(au_uffd_msg, uffd_msg, reserved2);
SAME_FIELD(au_uffd_msg, uffd_msg, reserved3);
SAME_FIELD(au_uffd_msg, uffd_msg, arg.pagefault.flags);
SAME_FIELD(au_uffd_msg, uffd_msg, arg.pagefault.address);
SAME_FIELD(au_uffd_msg, uffd_msg, arg.fork.ufd);
SAME_FIELD(au_uffd_msg, uffd_msg, arg.remap.from);
SAME_FIELD(au_uffd_msg, uffd_msg, arg.remap.to);
SAME_FIELD(au_uffd_msg, uffd_msg, arg.remap.len);
SAME_FIELD(au_uffd_msg, uffd_msg, arg.remove.start);
SAME_FIELD(au_uffd_msg, uffd_msg, arg.remove.end);
#ifdef UFFD_FEATURE_THREAD_ID
SAME(offsetof(struct au_uffd_msg, arg.pagefault.ptid),
     offsetof(struct uffd_msg, arg.pagefault.feat.ptid));
#endif

#ifdef UFFD_EVENT_PAGEFAULT
SAME(AU_EVENT_PAGEFAULT, UFFD_EVENT_PAGEFAULT);
#endif
#ifdef UFFD_EVENT_FORK
SAME(AU_EVENT_FORK, UFFD_EVENT_FORK);
#endif
#ifdef UFFD_EVENT_REMAP
SAME(AU_EVENT_REMAP, UFFD_EVENT_REMAP);
#endif
#ifdef UFFD_EVENT_REMOVE
SAME(AU_EVENT_REMOVE, UFFD_EVENT_REMOVE);
#endif
#ifdef UFFD_EVENT_UNMAP
SAME(AU_EVENT_UNMAP, UFFD_EVENT_UNMAP);
#endif
#ifdef UFFD_PAGEFAULT_FLAG_WRITE
SAME(AU_PAGEFAULT_FLAG_WRITE, UFFD_PAGEFAULT_FLAG_WRITE);
#endif
#ifdef UFFD_PAGEFAULT_FLAG_WP
SAME(AU_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WP);
#endif
#ifdef UFFD_PAGEFAULT_FLAG_MINOR
SAME(AU_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_MINOR);
#endif
#ifdef UFFD_PAGEFAULT_FLAG_RWP
SAME(AU_PAGEFAULT_FLAG_RWP, UFFD_PAGEFAULT_FLAG_RWP);
#endif

#ifdef PAGEMAP_SCAN
SAME(AU_PAGEMAP_SCAN, PAGEMAP_SCAN);
SAME(AU_PM_SCAN_WP_MATCHING, PM_SCAN_WP_MATCHING);
SAME(AU_PM_SCAN_CHECK_WPASYNC, PM_SCAN_CHECK_WPASYNC);
SAME_SIZE(au_page_region, page_region);
SAME_FIELD(au_page_region, page_region, start);
SAME_FIELD(au_page_region, page_region, end);
SAME_FIELD(au_page_region, page_region, categories);
SAME_SIZE(au_pm_scan_arg, pm_scan_arg);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, size);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, flags);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, start);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, end);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, walk_end);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, vec);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, vec_len);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, max_pages);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, category_inverted);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, category_mask);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, category_anyof_mask);
SAME_FIELD(au_pm_scan_arg, pm_scan_arg, return_mask);
#endif

#ifdef PAGE_IS_WPALLOWED
SAME(AU_PAGE_IS_WPALLOWED, PAGE_IS_WPALLOWED);
#endif
#ifdef PAGE_IS_WRITTEN
SAME(AU_PAGE_IS_WRITTEN, PAGE_IS_WRITTEN);
#endif
#ifdef PAGE_IS_FILE
SAME(AU_PAGE_IS_FILE, PAGE_IS_FILE);
#endif
#ifdef PAGE_IS_PRESENT
SAME(AU_PAGE_IS_PRESENT, PAGE_IS_PRESENT);
#endif
#ifdef PAGE_IS_SWAPPED
SAME(AU_PAGE_IS_SWAPPED, PAGE_IS_SWAPPED);
#endif
#ifdef PAGE_IS_PFNZERO
SAME(AU_PAGE_IS_PFNZERO, PAGE_IS_PFNZERO);
#endif
#ifdef PAGE_IS_HUGE
SAME(AU_PAGE_IS_HUGE, PAGE_IS_HUGE);
#endif
#ifdef PAGE_IS_SOFT_DIRTY
SAME(AU_PAGE_IS_SOFT_DIRTY, PAGE_IS_SOFT_DIRTY);
#endif
#ifdef PAGE_IS_GUARD
SAME(AU_PAGE_IS_GUARD, PAGE_IS_GUARD);
#endif
#ifdef PAGE_IS_ACCESSED
SAME(AU_PAGE_IS_ACCESSED, PAGE_IS_ACCESSED);
#endif
