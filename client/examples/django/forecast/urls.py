"""The site, its admin, and its API."""

from django.contrib import admin
from django.contrib.auth.views import LoginView
from django.urls import path

from jobs.views import ComputeJobs, StartJob

urlpatterns = [
    path("admin/", admin.site.urls),
    path("login/", LoginView.as_view(template_name="jobs/login.html", next_page="/"), name="login"),
    path("", StartJob.as_view(), name="start"),
    path("v1/ai/jobs", ComputeJobs.as_view()),
]
